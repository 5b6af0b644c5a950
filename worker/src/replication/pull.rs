//! A disk read from the hypervisor's NBD server into a sink, a few pieces at a time.
//!
//! ```text
//!   block states ─▶ pieces ─▶ read (several at once) ─▶ sink
//!                                └─▶ trim: the hypervisor need not keep it any longer
//! ```
//! The hypervisor waits for nobody: its server is asked for what the sink takes. Pieces reach the sink in any order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::{FuturesUnordered, TryStreamExt};

use crate::nbd::{ClientError, Content, Extent, NbdClient, Sink, State};
use crate::replica::cap::Cap;

/// Most that is read at once. With [`MAX_IN_FLIGHT`] this bounds the memory for a disk.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces under way.
const MAX_IN_FLIGHT: usize = 16;
/// Most zeroes that are passed on at once, so that progress is seen.
const ZERO_PIECE_BYTES: u64 = 64 << 20;
/// What the hypervisor saves old bytes in: less is not worth a trim.
const TRIM_BYTES: u64 = 64 * 1024;

/// Why a disk was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The hypervisor.
    #[error("read the disk from the hypervisor")]
    Read(#[from] ClientError),
    /// The sink.
    #[error("pass on what was read")]
    Sink(#[source] io::Error),
}

/// Reads everything that is wanted of an export into `sink`, no faster than `pace`; `done_bytes` follows.
///
/// # Errors
/// The hypervisor or the sink failed; some of it has arrived then.
pub async fn pull(
    client: NbdClient,
    sink: Arc<impl Sink>,
    pace: Arc<Cap>,
    done_bytes: Arc<AtomicU64>,
) -> Result<(), PullError> {
    let (client, sink, pace, done_bytes) = (&client, &*sink, &*pace, &*done_bytes);
    let mut under_way = FuturesUnordered::new();
    let mut at = 0;
    while at < client.size_bytes() {
        let extents = client.extents(at).await?;
        at = extents.last().map_or(client.size_bytes(), |last| last.offset + last.length);
        for piece in extents.into_iter().flat_map(pieces) {
            if under_way.len() == MAX_IN_FLIGHT {
                under_way.try_next().await?;
            }
            under_way.push(async move {
                copy(client, sink, pace, piece).await?;
                done_bytes.fetch_add(piece.length, Ordering::Relaxed);
                Ok::<_, PullError>(())
            });
        }
    }
    while under_way.try_next().await?.is_some() {}
    Ok(())
}

/// An extent in pieces of bounded size; nothing of one that is not wanted.
fn pieces(extent: Extent) -> impl Iterator<Item = Extent> + Send {
    let step = match extent.state {
        State::Zero => ZERO_PIECE_BYTES,
        State::Data | State::Clean => PIECE_BYTES,
    };
    let end = if extent.state == State::Clean { extent.offset } else { extent.offset + extent.length };
    (extent.offset..end).step_by(step as usize).map(move |offset| Extent {
        offset,
        length: step.min(end - offset),
        state: extent.state,
    })
}

async fn copy(client: &NbdClient, sink: &impl Sink, pace: &Cap, piece: Extent) -> Result<(), PullError> {
    // Pieces have fewer than 2^32 bytes.
    let length = piece.length as u32;
    let content = match piece.state {
        State::Zero | State::Clean => Content::Zero,
        State::Data => {
            pace.take(piece.length).await;
            client.read(piece.offset, length).await?
        }
    };
    if piece.length >= TRIM_BYTES {
        // That spares the guest the saving of old bytes. It goes on without.
        if let Err(error) = client.trim(piece.offset, length).await {
            tracing::debug!(%error, "not trimmed");
        }
    }
    let passed = match content {
        Content::Data(bytes) => sink.write(piece.offset, bytes).await,
        Content::Zero => sink.zero(piece.offset, piece.length).await,
    };
    passed.map_err(PullError::Sink)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_cut_into_pieces_that_cover_it_and_a_clean_one_into_none() {
        let extent = Extent { offset: 4096, length: 2 * PIECE_BYTES + 4096, state: State::Data };
        let cut: Vec<_> = pieces(extent).map(|piece| (piece.offset, piece.length)).collect();
        assert_eq!(cut, [(4096, PIECE_BYTES), (4096 + PIECE_BYTES, PIECE_BYTES), (4096 + 2 * PIECE_BYTES, 4096)]);
        let zero = Extent { state: State::Zero, ..extent };
        assert_eq!(pieces(zero).map(|piece| piece.length).collect::<Vec<_>>(), [2 * PIECE_BYTES + 4096]);
        assert_eq!(pieces(Extent { state: State::Clean, ..extent }).count(), 0);
    }
}
