//! What workers and clients ask of controllers, and how they find the one that leads: as the product's clients do.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use pageport_controller::model::State;
use pageport_controller::model::command::{ClientOrder, Outcome};
use pageport_proto::v1;
use pageport_proto::{RequestId, WorkerName};
use tokio::sync::oneshot;

use crate::controller::Machine;
use crate::network::{End, Endpoint};
use crate::world::{Clock, World};

/// A worker's end of its stream of reports.
pub type WorkerEnd = End<v1::WorkerReport, v1::WorkerAssignment>;

/// What is asked of a controller.
pub enum Question {
    /// Take this stream.
    Link(WorkerName, End<v1::WorkerAssignment, v1::WorkerReport>),
    /// May the image of a move be loaded?
    Authorise(v1::AskAuthorisationRequest),
    /// May a VM be run?
    Grant(v1::AskGrantRequest),
    /// Another lease.
    Lease(v1::RenewLeaseRequest),
    /// A client's order.
    Client(RequestId, ClientOrder),
    /// A client wants to see the state.
    State,
}

/// What is answered.
pub enum Answer {
    /// Somebody else leads, perhaps this one.
    NotLeader(Option<u64>),
    /// The stream is taken.
    Linked,
    /// May the image be loaded?
    Authorised(Box<v1::AskAuthorisationResponse>),
    /// May it run?
    Granted(v1::AskGrantResponse),
    /// The lease.
    Leased(v1::RenewLeaseResponse),
    /// What became of an order.
    Outcome(Outcome),
    /// It is not known what became of the order.
    Unknown,
    /// The state.
    State(Arc<State>),
}

/// A question, and the way back.
pub struct Call {
    /// What.
    pub question: Question,
    /// Answers, over the network.
    pub reply: Box<dyn FnOnce(Answer)>,
}

/// What comes in from the network.
pub enum Arriving {
    /// Of a peer.
    Raft(Vec<u8>),
    /// Of a worker or client.
    Call(Box<Call>),
}

/// All controllers, for those who look for the leader.
pub type Cluster = Rc<BTreeMap<u64, Rc<Machine>>>;

/// Asks whoever leads; follows hints, as the product's clients do.
pub async fn ask(
    world: &Rc<World>,
    cluster: &Cluster,
    from: Endpoint,
    clock: Clock,
    leader: &Cell<u64>,
    question: impl Fn() -> Question,
) -> Option<Answer> {
    const ANSWER_WITHIN: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(200);
    for _ in 0..2 * cluster.len() {
        let machine = cluster.get(&leader.get())?;
        let (answer, answered) = oneshot::channel();
        let (there, back) = (machine.endpoint(), from);
        let reply_world = world.clone();
        let reply = move |said: Answer| {
            let slot = RefCell::new(Some((answer, said)));
            reply_world.datagram(there, back, move || {
                if let Some((answer, said)) = slot.take() {
                    // Who asked may have stopped waiting.
                    let _ = answer.send(said);
                }
            });
        };
        let call = RefCell::new(Some(Call { question: question(), reply: Box::new(reply) }));
        let to = machine.clone();
        world.datagram(from, there, move || {
            if let Some(call) = call.take() {
                to.arrive(Arriving::Call(Box::new(call)));
            }
        });
        let answer = tokio::select! {
            biased;
            answer = answered => answer.ok(),
            () = clock.sleep(world, ANSWER_WITHIN) => None,
        };
        let hint = match answer {
            Some(Answer::NotLeader(hint)) => hint,
            Some(answer) => return Some(answer),
            None => None,
        };
        leader.set(hint.filter(|hint| *hint != leader.get()).unwrap_or(leader.get() % cluster.len() as u64 + 1));
        clock.sleep(world, PAUSE).await;
    }
    None
}
