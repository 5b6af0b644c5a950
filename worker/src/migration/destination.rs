//! The destination of a move: its phases in order.
//!
//! | phase | does | on failure |
//! |---|---|---|
//! | `admit` | asks the controllers, starts a hypervisor that waits | abort with the reason |
//! | `receive` | rebuilds the stream into the hypervisor | ends the hypervisor, abort |
//! | `load` | compares digests, brings the replica to stable storage, vouches: `Ready` | ends the hypervisor, abort |
//! | `resume` | on release: durable `Own`, then runs | never drops the image on its own |
//!
//! Once it has vouched, only the source's `Abort` (sent after its durable revocation) or the controllers end the image.
//!
//! Each phase is a module of its own, and beside them are:
//!
//! | module | what |
//! |---|---|
//! | `words` | what is said on the control stream |
//! | `memory` | whether the host has memory for the guest |
//! | `error` | why a move was not taken |

mod admit;
mod error;
mod load;
mod memory;
mod receive;
mod resume;
mod words;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_common::telemetry;
use pageport_proto::v1::{Abort, Accepted, MigrationHello, to_destination, to_source};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

pub use self::error::DestinationError;
pub use self::memory::check_memory;
use self::words::{read_control, write_answers};
use crate::failpoint;
use crate::memory::KeptPages;
use crate::node::Node;
use crate::transport::{MessageError, MessageReader, MessageWriter, PeerConnection};

/// Words of the source that wait for their phase; it sends a handful.
const CONTROL_QUEUE: usize = 16;
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// Serves one migration, from its hello to its end.
pub async fn serve(
    node: Arc<Node>,
    connection: PeerConnection,
    hello: MigrationHello,
    traceparent: &str,
    reader: MessageReader,
    writer: MessageWriter,
) {
    let span = tracing::info_span!(
        "migration",
        migration_id = %hello.migration_id,
        vm_id = %hello.vm_id,
        epoch = hello.epoch,
        role = "destination"
    );
    telemetry::adopt_traceparent(&span, traceparent);
    async {
        let (answers, queue) = mpsc::unbounded_channel();
        let writing = AbortOnDropHandle::new(tokio::spawn(write_answers(writer, queue)));
        let (words, control) = mpsc::channel(CONTROL_QUEUE);
        let reading = tokio::spawn(read_control(reader, answers.clone(), words));
        let mut arrival = Arrival {
            node,
            connection: connection.clone(),
            control,
            answers,
            _reading: AbortOnDropHandle::new(reading),
        };
        match arrival.run(&hello).await {
            Ok(()) => tracing::info!("migration ended at its destination"),
            Err(error) => {
                let reason = crate::error::with_causes(&error);
                tracing::warn!(reason, "migration not taken");
                arrival.say(to_source::Kind::Abort(Abort { reason }));
            }
        }
        drop(arrival);
        // The source closes the connection when it has heard the last word.
        let _ = writing.await;
        let closing = tokio::time::timeout(RESUME_LIMIT, connection.closed()).await;
        if closing.is_err() {
            connection.close("migration ended");
        }
    }
    .instrument(span)
    .await;
}

struct Arrival {
    node: Arc<Node>,
    connection: PeerConnection,
    control: mpsc::Receiver<Result<to_destination::Kind, MessageError>>,
    answers: mpsc::UnboundedSender<to_source::Kind>,
    _reading: AbortOnDropHandle<()>,
}

impl Arrival {
    async fn run(&mut self, hello: &MigrationHello) -> Result<(), DestinationError> {
        let admitted = self.phase("admit", async |this| this.admit(hello).await).await?;
        let held = self.held(&admitted, hello);
        let kept_pages = held.kept.as_ref().map_or(0, KeptPages::count);
        self.say(to_source::Kind::Accepted(Accepted { kept_pages }));
        let loaded = async {
            let (end, arrived) = self.phase("receive", async |this| this.receive(&admitted, hello, held).await).await?;
            self.phase("load", async |this| this.load(&admitted, hello, &end).await).await?;
            Ok::<_, DestinationError>(arrived)
        };
        let arrived = match loaded.await {
            Ok(arrived) => arrived,
            Err(error) => {
                admitted.vm.drop_image(&admitted.qemu).await?;
                return Err(error);
            }
        };
        self.phase("resume", async |this| this.resume(&admitted).await).await?;
        self.node.memory.came(admitted.vm.id(), arrived);
        Ok(())
    }

    async fn phase<T>(
        &mut self,
        name: &'static str,
        body: impl AsyncFnOnce(&mut Self) -> Result<T, DestinationError>,
    ) -> Result<T, DestinationError> {
        let began = Instant::now();
        failpoint::reach("destination", name).await;
        let outcome = body(self).instrument(tracing::info_span!("phase", phase = name)).await;
        tracing::info!(
            phase = name,
            duration_ms = began.elapsed().as_millis() as u64,
            ok = outcome.is_ok(),
            "phase ended"
        );
        outcome
    }

    fn say(&self, kind: to_source::Kind) {
        // A control stream that is gone is noticed by who reads it.
        let _ = self.answers.send(kind);
    }
}
