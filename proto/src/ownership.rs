//! Ownership records and policies between wire and domain.

use pageport_ownership::{Epoch, Policy, Record};

use crate::v1;
use crate::v1::ownership_record::Kind;

/// A record on the wire that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("ownership record of kind {kind} is unknown")]
pub struct UnknownRecord {
    /// What came.
    pub kind: i32,
}

impl From<Record> for v1::OwnershipRecord {
    fn from(record: Record) -> Self {
        let (kind, own, epoch, seen) = match record {
            Record::Replica { seen, refused } => (Kind::Replica, Epoch::ZERO, refused.unwrap_or_default(), seen),
            Record::Own { own, seen } => (Kind::Own, own, Epoch::ZERO, seen),
            Record::Prepared { own, epoch } => (Kind::Prepared, own, epoch, Epoch::ZERO),
            Record::Released { epoch } => (Kind::Released, Epoch::ZERO, epoch, Epoch::ZERO),
        };
        Self { kind: kind.into(), own: own.raw(), epoch: epoch.raw(), seen: seen.raw() }
    }
}

impl TryFrom<&v1::OwnershipRecord> for Record {
    type Error = UnknownRecord;

    fn try_from(record: &v1::OwnershipRecord) -> Result<Self, UnknownRecord> {
        let [own, epoch, seen] = [record.own, record.epoch, record.seen].map(Epoch::from_raw);
        match record.kind() {
            Kind::Replica => Ok(Self::Replica { seen, refused: (epoch != Epoch::ZERO).then_some(epoch) }),
            Kind::Own => Ok(Self::Own { own, seen }),
            Kind::Prepared => Ok(Self::Prepared { own, epoch }),
            Kind::Released => Ok(Self::Released { epoch }),
            Kind::Unspecified => Err(UnknownRecord { kind: record.kind }),
        }
    }
}

impl From<v1::IsolationPolicy> for Policy {
    fn from(policy: v1::IsolationPolicy) -> Self {
        match policy {
            v1::IsolationPolicy::Unspecified | v1::IsolationPolicy::KeepRunning => Self::KeepRunning,
            v1::IsolationPolicy::SelfFence => Self::SelfFence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_survives_the_wire() {
        let [one, two] = [Epoch::from_raw(1), Epoch::from_raw(2)];
        for record in [
            Record::UNKNOWN,
            Record::Replica { seen: two, refused: Some(one) },
            Record::Own { own: one, seen: two },
            Record::Prepared { own: one, epoch: two },
            Record::Released { epoch: two },
        ] {
            assert_eq!(Record::try_from(&v1::OwnershipRecord::from(record)), Ok(record));
        }
        assert!(Record::try_from(&v1::OwnershipRecord::default()).is_err());
    }
}
