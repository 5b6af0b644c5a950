//! raft's own log lines, through slog, into tracing.

use slog::{Drain, Level, Never, OwnedKVList, Record};

struct Bridge;

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let mut fields = Fields(String::new());
        // The serializer below cannot fail: it writes into a string.
        let _ = slog::KV::serialize(&record.kv(), record, &mut fields);
        let _ = slog::KV::serialize(values, record, &mut fields);
        let message = record.msg();
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", fields = fields.0, "{message}"),
            Level::Warning => tracing::warn!(target: "raft", fields = fields.0, "{message}"),
            // raft calls each election step "info": a controller's own log says who leads.
            Level::Info | Level::Debug => tracing::debug!(target: "raft", fields = fields.0, "{message}"),
            Level::Trace => tracing::trace!(target: "raft", fields = fields.0, "{message}"),
        }
        Ok(())
    }
}

struct Fields(String);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(&format!("{key}={value}"));
        Ok(())
    }
}

/// A logger for raft.
pub fn logger() -> slog::Logger {
    slog::Logger::root(Bridge, slog::o!())
}
