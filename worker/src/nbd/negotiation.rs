//! The first part of a connection: client and server agree on the export.
//!
//! ```text
//!   greeting ─▶ client flags ─▶ option* ─┬─ GO, and there is such an export ─▶ transmission
//!                                        └─ ABORT, hostile bytes, too many options, too late ─▶ end
//! ```

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::protocol::{
    Access, MAX_OPTIONS, OPTION_HEADER_BYTES, OptionKind, OptionReply, ProtocolError, block_size, greeting,
    parse_client_flags, parse_export_name, parse_option_header,
};

/// How a negotiation ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Transmission begins, with the export of this number.
    Transmission(usize),
    /// The client has seen enough.
    Aborted,
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The peer's bytes.
    #[error("NBD peer refused")]
    Protocol(#[from] ProtocolError),
    /// The socket.
    #[error("NBD connection broken")]
    Io(#[from] io::Error),
    /// The peer's pace.
    #[error("NBD peer too slow to {operation}")]
    Slow {
        /// What it should have done.
        operation: &'static str,
    },
}

/// What is offered.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) access: Access,
}

/// Negotiates about the exports.
pub(super) async fn negotiate<S>(stream: &mut S, offers: &[Offer]) -> Result<Outcome, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&greeting()).await?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags).await?;
    parse_client_flags(flags)?;
    for _ in 0..MAX_OPTIONS {
        let mut header = [0; OPTION_HEADER_BYTES];
        stream.read_exact(&mut header).await?;
        let (kind, length) = parse_option_header(&header)?;
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        let (replies, chosen) = answer(kind, &data, offers);
        let bytes: Vec<u8> = replies.iter().flat_map(|reply| reply.format(kind)).collect();
        stream.write_all(&bytes).await?;
        match (kind, chosen) {
            (OptionKind::Abort, _) => return Ok(Outcome::Aborted),
            (OptionKind::Go, Some(chosen)) => return Ok(Outcome::Transmission(chosen)),
            _ => {}
        }
    }
    Err(ProtocolError::TooManyOptions.into())
}

/// What is answered to an option, and the export that it names.
fn answer(kind: OptionKind, data: &[u8], offers: &[Offer]) -> (Vec<OptionReply>, Option<usize>) {
    let replies = match kind {
        OptionKind::Abort => vec![OptionReply::Ack],
        OptionKind::List if data.is_empty() => {
            let names = offers.iter().map(|offer| OptionReply::Server(offer.name.clone()));
            names.chain([OptionReply::Ack]).collect()
        }
        OptionKind::List => vec![OptionReply::Invalid],
        OptionKind::Info | OptionKind::Go => {
            let Some(name) = parse_export_name(data) else { return (vec![OptionReply::Invalid], None) };
            let Some(chosen) = offers.iter().position(|offer| offer.name == name) else {
                return (vec![OptionReply::UnknownExport], None);
            };
            let Offer { size, access, .. } = offers[chosen];
            let sizes = OptionReply::BlockSize { minimum: block_size(size) };
            return (vec![OptionReply::Export { size, access }, sizes, OptionReply::Ack], Some(chosen));
        }
        OptionKind::Unknown(_) => vec![OptionReply::Unsupported],
    };
    (replies, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(code: u32, data: &[u8]) -> Vec<u8> {
        [b"IHAVEOPT", &code.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
    }

    async fn play(bytes: Vec<u8>) -> Result<Outcome, ConnectionError> {
        let (mut client, mut server) = tokio::io::duplex(1 << 16);
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let offer = |name: &str| Offer { name: name.to_owned(), size: 1 << 20, access: Access::ReadOnly };
        negotiate(&mut server, &[offer("other"), offer("disk")]).await
    }

    #[tokio::test]
    async fn a_wrong_name_and_unknown_options_may_be_followed_by_the_right_name() {
        let mut bytes = vec![0, 0, 0, 3];
        bytes.extend(option(8, b""));
        bytes.extend(option(3, b""));
        bytes.extend(option(7, b"\x00\x00\x00\x04nope\x00\x00"));
        bytes.extend(option(6, b"\x00\x00\x00\x04disk\x00\x00"));
        bytes.extend(option(7, b"\x00\x00\x00\x04disk\x00\x00"));
        assert_eq!(play(bytes).await.unwrap(), Outcome::Transmission(1));
    }

    #[tokio::test]
    async fn abort_ends_it_in_order() {
        let bytes = [vec![0, 0, 0, 1], option(2, b"")].concat();
        assert_eq!(play(bytes).await.unwrap(), Outcome::Aborted);
    }

    #[tokio::test]
    async fn hostile_bytes_end_it() {
        let endless: Vec<u8> = [vec![0, 0, 0, 3], option(8, b"").repeat(MAX_OPTIONS)].concat();
        assert!(matches!(play(endless).await, Err(ConnectionError::Protocol(ProtocolError::TooManyOptions))));
        let wrong = b"\x00\x00\x00\x03GET / HTTP/1.1\r\n\r\n".to_vec();
        assert!(matches!(play(wrong).await, Err(ConnectionError::Protocol(ProtocolError::Magic { .. }))));
        let cut = [vec![0, 0, 0, 3], option(7, b"\x00\x00\x00\x04disk\x00\x00")[..20].to_vec()].concat();
        assert!(matches!(play(cut).await, Err(ConnectionError::Io(_))));
    }
}
