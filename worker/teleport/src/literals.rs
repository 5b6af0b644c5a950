//! Compression of the literal bytes.
//!
//! ```text
//! main stream   batch 0 ─▶ batch 1 ─▶ batch 2 …     one zstd stream: each batch is flushed, its window goes on
//! fallback      batch n                             a zstd frame of its own
//! ```
//! Guarantees: a batch's bytes suffice to decompress it, given all batches before it; memory is bounded by the window
//! ([`LITERAL_WINDOW_LOG`]); a decompressor writes no more than it was told to expect. zstd takes a new level only with
//! a new frame, so a change of level gives up the window once.

use std::fmt;
use std::io;

use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use crate::wire::limits::LITERAL_WINDOW_LOG;

/// How hard literals are compressed: zstd's levels, within what a live migration can use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Level(i32);

impl Level {
    /// The fastest.
    pub const FASTEST: Self = Self(-7);
    /// Where a migration starts.
    pub const DEFAULT: Self = Self(1);
    /// The densest.
    pub const DENSEST: Self = Self(15);

    /// The nearest level to zstd's `level`.
    pub fn nearest(level: i32) -> Self {
        Self(level.clamp(Self::FASTEST.0, Self::DENSEST.0))
    }

    /// Whether matches are worth looking for in the whole window; the quick levels look only nearby.
    fn is_dense(self) -> bool {
        self >= Self::DEFAULT
    }

    /// zstd's number.
    pub fn get(self) -> i32 {
        self.0
    }
}

impl Default for Level {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Bytes that a compressor is given room for at a time.
const OUTPUT_STEP: usize = 64 << 10;

/// Compresses the literals of one main stream.
pub(crate) struct Compressor {
    zstd: Encoder<'static>,
    level: Level,
    wanted: Level,
    in_frame: bool,
    output: Vec<u8>,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Compressor {
    pub(crate) fn new(level: Level) -> io::Result<Self> {
        let mut zstd = Encoder::new(level.0)?;
        zstd.set_parameter(CParameter::WindowLog(LITERAL_WINDOW_LOG))?;
        zstd.set_parameter(CParameter::EnableLongDistanceMatching(level.is_dense()))?;
        zstd.set_parameter(CParameter::ChecksumFlag(false))?;
        zstd.set_parameter(CParameter::ContentSizeFlag(false))?;
        Ok(Self { zstd, level, wanted: level, in_frame: false, output: Vec::new() })
    }

    /// The level from the next batch on.
    pub(crate) fn set_level(&mut self, level: Level) {
        self.wanted = level;
    }

    /// Takes the next bytes of the batch.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.level != self.wanted {
            self.change_level()?;
        }
        self.in_frame = true;
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            run(&mut self.output, |output| self.zstd.run(&mut input, output))?;
        }
        Ok(())
    }

    /// Ends the batch: what it takes on the wire.
    pub(crate) fn flush(&mut self) -> io::Result<Vec<u8>> {
        if self.in_frame {
            while run(&mut self.output, |output| self.zstd.flush(output))? > 0 {}
        }
        Ok(std::mem::take(&mut self.output))
    }

    /// Ends the frame, so that the next one begins at the wanted level.
    fn change_level(&mut self) -> io::Result<()> {
        if self.in_frame {
            while run(&mut self.output, |output| self.zstd.finish(output, true))? > 0 {}
            self.in_frame = false;
        }
        self.zstd.set_parameter(CParameter::CompressionLevel(self.wanted.0))?;
        self.zstd.set_parameter(CParameter::EnableLongDistanceMatching(self.wanted.is_dense()))?;
        self.level = self.wanted;
        Ok(())
    }
}

/// What literals would take on the wire, sent one after the other: for forecasts.
#[derive(Debug)]
pub struct LiteralSizer(Compressor);

impl LiteralSizer {
    /// At the level at which a migration starts.
    ///
    /// # Errors
    /// zstd has no memory.
    pub fn new() -> io::Result<Self> {
        Compressor::new(Level::DEFAULT).map(Self)
    }

    /// Bytes on the wire of these, as a batch of their own.
    ///
    /// # Errors
    /// zstd fails.
    pub fn wire_bytes(&mut self, literals: &[u8]) -> io::Result<usize> {
        self.0.add(literals)?;
        Ok(self.0.flush()?.len())
    }
}

/// Gives one step of zstd some room at the end of `output`.
fn run(output: &mut Vec<u8>, step: impl FnOnce(&mut OutBuffer<'_, Vec<u8>>) -> io::Result<usize>) -> io::Result<usize> {
    output.reserve(OUTPUT_STEP);
    let written = output.len();
    step(&mut OutBuffer::around_pos(output, written))
}

/// Decompresses the literals of one main stream.
pub(crate) struct Decompressor(Decoder<'static>);

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

impl Decompressor {
    pub(crate) fn new() -> io::Result<Self> {
        let mut zstd = Decoder::new()?;
        zstd.set_parameter(DParameter::WindowLogMax(LITERAL_WINDOW_LOG))?;
        Ok(Self(zstd))
    }

    /// Decompresses one batch into `output`, which is overwritten. Says whether it came to exactly `expected` bytes.
    pub(crate) fn batch(&mut self, bytes: &[u8], expected: usize, output: &mut Vec<u8>) -> io::Result<bool> {
        output.clear();
        // One byte more than expected: zstd has given all that it can once it leaves room.
        output.reserve_exact(expected + 1);
        let mut room = OutBuffer::around(output);
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            self.0.run(&mut input, &mut room)?;
            if room.pos() > expected {
                return Ok(false);
            }
        }
        Ok(room.pos() == expected)
    }
}

/// Level of what is sent again: the batch is waited for.
const FALLBACK_LEVEL: i32 = 1;

/// Compresses a batch that stands alone.
pub(crate) fn compress_alone(bytes: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(bytes, FALLBACK_LEVEL)
}

/// Decompresses a batch that stands alone; the result is never longer than `expected`.
pub(crate) fn decompress_alone(bytes: &[u8], expected: usize) -> io::Result<Vec<u8>> {
    zstd::bulk::decompress(bytes, expected)
}
