//! Any message of the API as one line of JSON.
//!
//! | in the .proto | in JSON |
//! |---|---|
//! | field `wan_bytes` | key `wan_bytes`, in the order of declaration, always present |
//! | integers of all widths | number |
//! | enum value `VM_STATE_IN_DOUBT` | `"in_doubt"`; a value of a newer API: its number |
//! | absent message or `optional` field | `null` |
//! | `bytes` | string of hex digits |
//!
//! Walks the API's own description, so a field that is added there appears here by itself.

use std::sync::OnceLock;

use pageport_proto::{FILE_DESCRIPTOR_SET, v1};
use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, ReflectMessage, Value};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

use crate::error::CtlError;

/// A message that knows its own name in the API.
pub trait Wire: prost::Message {
    /// Without the package.
    const NAME: &'static str;
}

macro_rules! wire {
    ($($message:ident),* $(,)?) => {
        $(impl Wire for v1::$message { const NAME: &'static str = stringify!($message); })*
    };
}

wire!(
    AddMemberResponse,
    ClosePointResponse,
    DeclareWorkerDeadResponse,
    DeleteReplicaResponse,
    DeleteVmResponse,
    DrainStatus,
    FenceWorkerResponse,
    GetClusterStatusResponse,
    Limits,
    Link,
    ListLinksResponse,
    ListMigrationsResponse,
    ListRecoveryPointsResponse,
    ListReplicasResponse,
    ListSitesResponse,
    ListVmsResponse,
    ListWorkersResponse,
    Migration,
    PointExport,
    PreflightMigrationResponse,
    Quote,
    RemoveMemberResponse,
    Replica,
    RestoreResponse,
    TransferLeadershipResponse,
    UndrainResponse,
    UnprotectVmResponse,
    Vm,
);

/// One line, without its end.
///
/// # Errors
/// When the compiled-in description does not fit the compiled-in types.
pub fn line<M: Wire>(message: &M) -> Result<String, CtlError> {
    static POOL: OnceLock<Option<DescriptorPool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).ok());
    let described = pool.as_ref().and_then(|pool| pool.get_message_by_name(&format!("pageport.v1.{}", M::NAME)));
    let inconsistent = || CtlError::Json { message: M::NAME };
    let descriptor = described.ok_or_else(inconsistent)?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(|_| inconsistent())?;
    serde_json::to_string(&Message(&dynamic)).map_err(|_| inconsistent())
}

struct Message<'a>(&'a DynamicMessage);

impl Serialize for Message<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let descriptor = self.0.descriptor();
        let mut map = serializer.serialize_map(Some(descriptor.fields().len()))?;
        for field in descriptor.fields() {
            if field.supports_presence() && !self.0.has_field(&field) {
                map.serialize_entry(field.name(), &())?;
            } else {
                map.serialize_entry(field.name(), &Field(&field, &self.0.get_field(&field)))?;
            }
        }
        map.end()
    }
}

struct Field<'a>(&'a FieldDescriptor, &'a Value);

impl Serialize for Field<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.1 {
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::I32(value) => serializer.serialize_i32(*value),
            Value::I64(value) => serializer.serialize_i64(*value),
            Value::U32(value) => serializer.serialize_u32(*value),
            Value::U64(value) => serializer.serialize_u64(*value),
            Value::F32(value) => serializer.serialize_f32(*value),
            Value::F64(value) => serializer.serialize_f64(*value),
            Value::String(value) => serializer.serialize_str(value),
            Value::Bytes(value) => {
                serializer.serialize_str(&value.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
            }
            Value::EnumNumber(number) => match self.0.kind() {
                Kind::Enum(of) => match short_name(&of, *number) {
                    Some(name) => serializer.serialize_str(&name),
                    None => serializer.serialize_i32(*number),
                },
                _ => serializer.serialize_i32(*number),
            },
            Value::Message(message) => Message(message).serialize(serializer),
            Value::List(values) => {
                let mut list = serializer.serialize_seq(Some(values.len()))?;
                for value in values {
                    list.serialize_element(&Field(self.0, value))?;
                }
                list.end()
            }
            // The API has no maps; should it get one, its keys would need a rule of their own.
            Value::Map(_) => Err(serde::ser::Error::custom("maps have no JSON form yet")),
        }
    }
}

fn short_name(of: &EnumDescriptor, number: i32) -> Option<String> {
    let value = of.get_value(number)?;
    let mut prefix = String::new();
    for character in of.name().chars() {
        if character.is_ascii_uppercase() && !prefix.is_empty() {
            prefix.push('_');
        }
        prefix.push(character.to_ascii_uppercase());
    }
    prefix.push('_');
    Some(value.name().strip_prefix(&prefix).unwrap_or(value.name()).to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::render::record::tests::finished;

    fn parsed<M: Wire>(message: &M) -> Value {
        serde_json::from_str(&line(message).unwrap()).unwrap()
    }

    #[test]
    fn a_finished_migration_carries_the_record_by_its_documented_keys() {
        let value = parsed(&finished());
        assert_eq!(value["state"], "completed");
        assert_eq!(value["progress"], Value::Null);
        assert_eq!(value["created_unix_ms"], 1_700_000_000_000_i64);
        assert_eq!(
            value["record"],
            json!({
                "total_time_ms": 6210, "memory_time_ms": 4896, "downtime_ms": 312,
                "wan_bytes": 73_610_035_u64, "disk_wan_bytes": 1_258_291, "memory_bytes": 2_104_492_032_u64,
                "pages": {"zero": 81_087, "teleported": 405_574, "literal": 37_757, "fallback": 12},
                "stream_digest_match": true,
                "phases": [
                    {"name": "connect", "duration_ms": 52},
                    {"name": "disk-sync", "duration_ms": 1260},
                    {"name": "memory", "duration_ms": 4584},
                    {"name": "switchover", "duration_ms": 312},
                ],
                "stream_digest": "ab12",
                "downtime_parts": [{"name": "last pages", "duration_ms": 200}],
                "quote": null,
                "warnings": [],
                "convergence": null,
            })
        );
    }

    #[test]
    fn enums_have_short_names_and_defaults_are_present() {
        let vm = v1::Vm { state: v1::VmState::InDoubt.into(), spec: Some(v1::VmSpec::default()), ..Default::default() };
        let value = parsed(&vm);
        assert_eq!(value["state"], "in_doubt");
        assert_eq!(value["replicas"], json!([]));
        assert_eq!(value["desired_running"], false);
        assert_eq!(value["spec"]["direct_boot"], Value::Null);
        assert_eq!(value["spec"]["memory_bytes"], 0);
        assert_eq!(parsed(&v1::Vm { state: 99, ..Default::default() })["state"], 99);
    }

    #[test]
    fn every_message_that_is_printed_is_described() {
        assert_eq!(line(&v1::DeleteVmResponse {}).unwrap(), "{}");
        assert_eq!(line(&v1::DeleteReplicaResponse {}).unwrap(), "{}");
        assert_eq!(line(&v1::ListSitesResponse::default()).unwrap(), r#"{"sites":[]}"#);
        assert_eq!(line(&v1::ListWorkersResponse::default()).unwrap(), r#"{"workers":[]}"#);
        assert_eq!(line(&v1::ListVmsResponse::default()).unwrap(), r#"{"vms":[],"found":[]}"#);
        assert_eq!(line(&v1::ListMigrationsResponse::default()).unwrap(), r#"{"migrations":[]}"#);
        assert_eq!(line(&v1::ListReplicasResponse::default()).unwrap(), r#"{"replicas":[]}"#);
        assert_eq!(line(&v1::UnprotectVmResponse {}).unwrap(), "{}");
        assert_eq!(line(&v1::ListRecoveryPointsResponse::default()).unwrap(), r#"{"points":[],"exports":[]}"#);
        assert_eq!(line(&v1::ClosePointResponse {}).unwrap(), "{}");
        assert_eq!(parsed(&v1::PointExport { state: 1, ..Default::default() })["state"], "open");
        assert_eq!(line(&v1::ListLinksResponse::default()).unwrap(), r#"{"links":[]}"#);
        let finding = v1::Finding::blocks(v1::Check::DiskSpace, "full", "make room");
        assert_eq!(
            line(&v1::PreflightMigrationResponse { findings: vec![finding] }).unwrap(),
            r#"{"findings":[{"check":"disk_space","severity":"blocks","seen":"full","fix":"make room"}]}"#
        );
        assert_eq!(
            line(&v1::Link::default()).unwrap(),
            r#"{"from_site":"","to_site":"","cap_bps":0,"budget_bps":0,"migrations":0}"#
        );
        assert_eq!(parsed(&v1::Replica { state: 2, ..Default::default() })["state"], "seeded");
        assert_eq!(parsed(&v1::GetClusterStatusResponse { term: 7, ..Default::default() })["term"], 7);
    }
}
