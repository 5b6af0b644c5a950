//! The lines of QMP: what is sent, and what a received line means. Pure.
//!
//! ```text
//!   ◀ {"QMP": {...}}                                   Greeting
//!   ▶ {"execute": NAME, "arguments": {...}, "id": n}
//!   ◀ {"return": {...}, "id": n}                       Reply, Ok
//!   ◀ {"error": {"class", "desc"}, "id": n}            Reply, Err
//!   ◀ {"event": NAME, "data": {...}, "timestamp": t}   Event
//! ```
//!
//! Unknown fields and unknown events are let through: QEMU adds some with every release.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A command with the type of its answer.
pub trait Command: Serialize {
    /// QMP's name of it.
    const NAME: &'static str;
    /// What `return` holds.
    type Reply: serde::de::DeserializeOwned;
}

/// For commands whose `return` is empty or of no interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Ignored {}

/// Declares a command: its QMP name, its fields (sent with `-` for `_`), its answer.
macro_rules! qmp_command {
    ($(#[$doc:meta])* $type:ident = $name:literal -> $reply:ty { $($(#[$field_meta:meta])* $field:ident : $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, serde::Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(crate) struct $type { $($(#[$field_meta])* pub $field: $kind),* }
        impl $crate::hypervisor::qmp::Command for $type {
            const NAME: &'static str = $name;
            type Reply = $reply;
        }
    };
}
pub(crate) use qmp_command;

/// QEMU's refusal of a command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Refusal {
    /// QMP's error class, such as `GenericError`.
    pub class: String,
    /// For people.
    pub desc: String,
}

/// Something that QEMU said without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct RawEvent {
    /// QMP's name of it.
    pub name: String,
    /// Its fields.
    pub data: Value,
    /// QEMU's clock (since the Unix epoch) when it happened.
    pub at: Duration,
}

/// One received line.
#[derive(Debug, Clone, PartialEq)]
pub enum Received {
    /// QEMU's first line.
    Greeting,
    /// The answer to command `id`.
    Reply {
        /// The number given with the command; absent when QEMU could not read the command at all.
        id: Option<u64>,
        /// What came of it.
        result: Result<Value, Refusal>,
    },
    /// Something happened.
    Event(RawEvent),
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    qmp: Option<Value>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
}

#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    // QEMU sends -1 for both when its clock cannot be read.
    fn since_epoch(&self) -> Duration {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let micros = u64::try_from(self.microseconds).unwrap_or(0).min(999_999);
        Duration::from_secs(seconds) + Duration::from_micros(micros)
    }
}

/// Reads one line; `None` for what is no QMP message.
pub fn parse(line: &str) -> Option<Received> {
    let line: Line = serde_json::from_str(line).ok()?;
    if line.qmp.is_some() {
        return Some(Received::Greeting);
    }
    if let Some(name) = line.event {
        let at = line.timestamp.map(|t| t.since_epoch()).unwrap_or_default();
        return Some(Received::Event(RawEvent { name, data: line.data, at }));
    }
    if let Some(refusal) = line.error {
        return Some(Received::Reply { id: line.id, result: Err(refusal) });
    }
    line.returned.map(|value| Received::Reply { id: line.id, result: Ok(value) })
}

/// Writes one command as a line, line end included.
pub fn format<C: Command>(id: u64, command: &C) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Sent<'a, C> {
        execute: &'static str,
        arguments: &'a C,
        id: u64,
    }
    let mut line = serde_json::to_string(&Sent { execute: C::NAME, arguments: command, id })?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    qmp_command!(MigrateContinue = "migrate-continue" -> Ignored { some_state: &'static str });

    #[test]
    fn a_command_is_one_line_with_dashed_names() {
        let line = format(7, &MigrateContinue { some_state: "pre-switchover" }).unwrap();
        let golden = r#"{"execute":"migrate-continue","arguments":{"some-state":"pre-switchover"},"id":7}"#;
        assert_eq!(line, format!("{golden}\n"));
    }

    #[test]
    fn each_kind_of_line_is_told_apart() {
        let greeting =
            r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#;
        assert_eq!(parse(greeting), Some(Received::Greeting));
        let reply = parse(r#"{"return": {"running": true}, "id": 3}"#);
        assert_eq!(reply, Some(Received::Reply { id: Some(3), result: Ok(serde_json::json!({"running": true})) }));
        let refusal = Refusal { class: "GenericError".into(), desc: "no".into() };
        let line = r#"{"id": 4, "error": {"class": "GenericError", "desc": "no"}}"#;
        assert_eq!(parse(line), Some(Received::Reply { id: Some(4), result: Err(refusal) }));
    }

    #[test]
    fn an_event_carries_qemus_own_time() {
        let line = r#"{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "STOP"}"#;
        let Some(Received::Event(event)) = parse(line) else { panic!("no event") };
        assert_eq!((event.name.as_str(), event.at), ("STOP", Duration::from_millis(1_700_000_000_250)));
    }

    #[test]
    fn what_is_no_qmp_message_is_refused() {
        for line in ["", "{}", "[]", "null", "{\"return\"", "\u{0}", "{\"event\": 4}"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_time_that_qemu_could_not_read_is_zero() {
        let line = r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}"#;
        let Some(Received::Event(event)) = parse(line) else { panic!("no event") };
        assert_eq!(event.at, Duration::ZERO);
    }
}
