//! A stream from the controllers that survives the loss of one.
//!
//! ```text
//!  open ─▶ messages ... ─▶ lost (note to the user) ─▶ next controller, after a pause ─▶ open ─▶ messages ...
//!                               └─ MAX_LOSSES in a row without a message: give up
//! ```
//! Every watch begins with the present state, so nothing needs to be remembered over a loss, and what happened in
//! between shows in the first message. A stream that says nothing for [`IDLE_LIMIT`] is opened again silently.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tonic::{Response, Status, Streaming};

use crate::client::{ClientError, Controllers, Verdict, judge};
use crate::trace::Traced;

/// Losses in a row, without a message between them, after which a watch gives up.
pub const MAX_LOSSES: u32 = 8;
/// Longest silence before the stream is opened again.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(4);

/// What a watch yields.
#[derive(Debug)]
pub enum Event<T> {
    /// From the controllers.
    Message(T),
    /// The stream broke; it is being opened again.
    Lost {
        /// In an operator's words.
        reason: String,
    },
}

/// A watch; `open` asks one controller for the stream.
pub struct Watch<'a, T, F> {
    controllers: &'a mut Controllers,
    open: F,
    stream: Option<Streaming<T>>,
    losses: u32,
}

impl<'a, T, F, Fut> Watch<'a, T, F>
where
    F: Fn(Traced) -> Fut,
    Fut: Future<Output = Result<Response<Streaming<T>>, Status>>,
{
    /// Opens nothing yet.
    pub fn new(controllers: &'a mut Controllers, open: F) -> Self {
        Self { controllers, open, stream: None, losses: 0 }
    }

    /// The next message or loss. After [`Event::Lost`] simply call again.
    ///
    /// # Errors
    /// When a controller refuses the watch, or after [`MAX_LOSSES`].
    pub async fn next(&mut self) -> Result<Event<T>, ClientError> {
        loop {
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => {
                    if self.losses > 0 {
                        sleep(pause(self.losses)).await;
                    }
                    match self.controllers.call(&self.open).await {
                        Ok(stream) => stream,
                        // They may all be restarting: what was followed once is worth some patience.
                        Err(error @ ClientError::NoAnswer { .. }) if self.losses > 0 => {
                            return self.lost(error.to_string());
                        }
                        Err(error) => return Err(error),
                    }
                }
            };
            let reason = match timeout(IDLE_LIMIT, stream.message()).await {
                Ok(Ok(Some(message))) => {
                    self.losses = 0;
                    self.stream = Some(stream);
                    return Ok(Event::Message(message));
                }
                Err(_) => continue,
                Ok(Ok(None)) => "the controller ended the stream".to_owned(),
                Ok(Err(status)) => match judge(&status) {
                    Verdict::Refused(message) => return Err(ClientError::Refused { message }),
                    Verdict::Failed(reason) => reason.text,
                },
            };
            self.controllers.move_on();
            return self.lost(reason);
        }
    }

    fn lost(&mut self, reason: String) -> Result<Event<T>, ClientError> {
        self.losses += 1;
        if self.losses < MAX_LOSSES { Ok(Event::Lost { reason }) } else { Err(ClientError::WatchLost { reason }) }
    }
}

fn pause(losses: u32) -> Duration {
    (FIRST_PAUSE * 2u32.saturating_pow(losses - 1)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        let all: Vec<u128> = (1..=MAX_LOSSES).map(|losses| pause(losses).as_millis()).collect();
        assert_eq!(all, [250, 500, 1000, 2000, 4000, 4000, 4000, 4000]);
    }
}
