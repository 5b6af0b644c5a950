//! Streams of views: now, then again after each change, bursts merged.
//!
//! Guarantees: a slow reader holds up nobody and gets the newest view next; the stream ends with an error when this
//! node no longer leads, so that the client asks the new leader.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::ApiError;
use super::{Api, Moment};

/// Views of one stream are at least this far apart.
const MIN_GAP: Duration = Duration::from_millis(100);
/// Connections are looked at this often when nothing is said.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const QUEUE: usize = 1;

/// A stream of views.
pub type Views<T> = ReceiverStream<Result<T, Status>>;

/// Does a stream go on after this view?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum More {
    /// Yes.
    Yes,
    /// It was the last one.
    No,
}

/// Streams what `render` makes of each moment; [`None`] ends the stream.
pub fn views<T, R>(api: Api, render: R) -> Views<T>
where
    T: Clone + PartialEq + Send + Sync + 'static,
    R: Fn(&Moment) -> Option<(T, More)> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = send_views(api, render, &sender).await {
            // The reader may be gone: then nobody needs the reason.
            let _ = sender.send(Err(error.into())).await;
        }
    });
    ReceiverStream::new(receiver)
}

async fn send_views<T, R>(api: Api, render: R, sender: &mpsc::Sender<Result<T, Status>>) -> Result<(), ApiError>
where
    T: Clone + PartialEq,
    R: Fn(&Moment) -> Option<(T, More)>,
{
    let mut state = api.consensus.watch_state();
    let mut status = api.consensus.watch_status();
    let mut observations = api.hub.watch();
    let mut last = None;
    loop {
        if !status.borrow_and_update().serving {
            return Err(ApiError::LeaderChanged);
        }
        state.mark_unchanged();
        observations.mark_unchanged();
        let Some((view, more)) = render(&api.glance()) else { return Ok(()) };
        if last.as_ref() != Some(&view) {
            if sender.send(Ok(view.clone())).await.is_err() {
                return Ok(());
            }
            last = Some(view);
        }
        if more == More::No {
            return Ok(());
        }
        tokio::select! {
            () = sender.closed() => return Ok(()),
            () = tokio::time::sleep(MIN_GAP) => {}
        }
        let changed = tokio::select! {
            () = sender.closed() => return Ok(()),
            changed = state.changed() => changed,
            changed = observations.changed() => changed,
            changed = status.changed() => changed,
            () = tokio::time::sleep(LOOK_EVERY) => Ok(()),
        };
        if changed.is_err() {
            return Err(ApiError::LeaderChanged);
        }
    }
}
