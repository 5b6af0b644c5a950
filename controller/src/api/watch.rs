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

/// What a stream shows of a moment.
#[derive(Debug)]
pub enum View<T> {
    /// This, and more may come.
    Show(T),
    /// This, and then it ends.
    Last(T),
    /// Nothing that was not shown already.
    Nothing,
    /// It ends.
    End,
}

/// Streams what `render` makes of each moment.
pub fn views<T, R>(api: Api, render: R) -> Views<T>
where
    T: Send + 'static,
    R: FnMut(&Moment) -> View<T> + Send + 'static,
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

/// A render for [`views`] that shows the whole of something, and nothing while it stays the same.
pub fn unless_same<T: Clone + PartialEq>(mut whole: impl FnMut(&Moment) -> T) -> impl FnMut(&Moment) -> View<T> {
    let mut last = None;
    move |moment| {
        let view = whole(moment);
        if last.as_ref() == Some(&view) {
            return View::Nothing;
        }
        last = Some(view.clone());
        View::Show(view)
    }
}

async fn send_views<T, R>(api: Api, mut render: R, sender: &mpsc::Sender<Result<T, Status>>) -> Result<(), ApiError>
where
    R: FnMut(&Moment) -> View<T>,
{
    let mut state = api.consensus.watch_state();
    let mut status = api.consensus.watch_status();
    let mut observations = api.hub.watch();
    loop {
        if !status.borrow_and_update().serving {
            return Err(ApiError::LeaderChanged);
        }
        state.mark_unchanged();
        observations.mark_unchanged();
        match render(&api.glance()) {
            View::Show(view) => {
                if sender.send(Ok(view)).await.is_err() {
                    return Ok(());
                }
            }
            View::Last(view) => {
                // The reader may be gone.
                let _ = sender.send(Ok(view)).await;
                return Ok(());
            }
            View::Nothing => {}
            View::End => return Ok(()),
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
