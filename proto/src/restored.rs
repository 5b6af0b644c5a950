//! What a restore of the controllers came to, in the words of who made it and of who ordered it.

use crate::v1::RestoreResponse;

impl RestoreResponse {
    /// In lines: what there is, what is to be done `next`, and who is waited for.
    pub fn in_words(&self, next: &str) -> String {
        let Self { generation, vms_unknown, awaited_workers } = self;
        let waits = match awaited_workers.join(", ") {
            workers if workers.is_empty() => String::new(),
            workers => format!("VMs are known again once these workers have reported: {workers}\n"),
        };
        format!("restored as generation {generation}: {vms_unknown} VMs, all unknown\n{next}\n{waits}")
    }
}
