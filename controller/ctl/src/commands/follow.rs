//! Following a stream until what it tells of has ended: the loop that all watching commands share.

use tokio::signal;
use tonic::{Response, Status, Streaming};

use crate::client::Controllers;
use crate::error::CtlError;
use crate::render::screen::Screen;
use crate::trace::Traced;
use crate::watch::{Event, Watch};

/// Gives each message to `take` until that has an answer. Ctrl-C ends it with `hint`: what was ordered goes on.
pub async fn follow<M, T, F, Fut>(
    controllers: &mut Controllers,
    screen: &mut Screen,
    hint: &str,
    open: F,
    mut take: impl FnMut(&mut Screen, M) -> Result<Option<T>, CtlError>,
) -> Result<T, CtlError>
where
    F: Fn(Traced) -> Fut,
    Fut: Future<Output = Result<Response<Streaming<M>>, Status>>,
{
    let mut updates = Watch::new(controllers, open);
    loop {
        let event = tokio::select! {
            event = updates.next() => event?,
            _ = signal::ctrl_c() => return Err(CtlError::Interrupted { hint: hint.to_owned() }),
        };
        match event {
            Event::Lost { reason } => screen.remark(&format!("lost the controller ({reason}); watching again")),
            Event::Message(message) => {
                if let Some(answer) = take(screen, message)? {
                    return Ok(answer);
                }
            }
        }
    }
}
