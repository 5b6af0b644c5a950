//! Finds the frames in a stream of bytes, wherever it is cut.
//!
//! ```text
//! push(bytes)* ─▶ [ header │ length │ frame … ] ─▶ next_frame() ─▶ Frame
//! ```
//! Guarantees: buffers at most one frame and what was pushed last; refuses a frame by its length alone. After an error
//! every further call gives the same error.

use super::frame::{Frame, FrameError};
use super::limits::FRAME_LENGTH_MAX;
use super::{MAGIC, version};

/// Incremental reader of one stream.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    opened: bool,
    failed: Option<FrameError>,
}

impl FrameReader {
    /// A reader at the start of a stream, its header included.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in what has arrived. Call [`FrameReader::next`] until it gives nothing before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether nothing is left over: a stream that ends otherwise was cut off.
    pub fn is_at_boundary(&self) -> bool {
        self.failed.is_none() && self.start == self.buffer.len()
    }

    /// The next whole frame, if it has arrived.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.read();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.start = 0;
        }
        result
    }

    fn read(&mut self) -> Result<Option<Frame>, FrameError> {
        if !self.opened {
            let Some(found) = self.buffer[self.start..].first_chunk::<5>() else { return Ok(None) };
            let [magic @ .., version] = *found;
            if magic != MAGIC {
                return Err(FrameError::Magic { found: magic });
            }
            if !version::accepts(version) {
                return Err(FrameError::Version { version });
            }
            self.start += found.len();
            self.opened = true;
        }
        let rest = &self.buffer[self.start..];
        let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_LENGTH_MAX {
            let (field, length) = ("frame", length as u64);
            return Err(FrameError::TooLong { field, length, limit: FRAME_LENGTH_MAX });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let frame = Frame::parse(body)?;
        self.start += 4 + length;
        Ok(Some(frame))
    }
}
