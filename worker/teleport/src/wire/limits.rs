//! Every limit of the wire format, checked before anything is allocated for a peer.

use crate::page::PAGE_SIZE;
use crate::qemu::RECORD_LENGTH_MAX;

/// A batch closes once it stands for so many bytes of QEMU's stream.
pub const BATCH_RAW_TARGET: usize = 4 << 20;
/// A batch closes once it carries so many literal bytes.
pub const BATCH_LITERAL_TARGET: usize = 512 << 10;
/// A batch closes once its operations take so many bytes.
pub const BATCH_OPS_TARGET: usize = 256 << 10;

/// Most bytes of QEMU's stream in a batch: the target is crossed by at most one record.
pub const BATCH_RAW_MAX: usize = BATCH_RAW_TARGET + RECORD_LENGTH_MAX;
/// Most literal bytes in a batch of the main stream.
pub const BATCH_LITERAL_MAX: usize = BATCH_LITERAL_TARGET + PAGE_SIZE;
/// Most bytes of operations in a batch: those of one record more than the target.
pub const BATCH_OPS_MAX: usize = BATCH_OPS_TARGET + 1024;
/// Most bytes of a compressed run of literals: what zstd makes at worst of a whole batch, with room for the ends of
/// its frames.
pub const COMPRESSED_MAX: usize = BATCH_RAW_MAX + (BATCH_RAW_MAX >> 8) + 4096;
/// Most bytes of a frame behind its length.
pub const FRAME_LENGTH_MAX: usize = 128 + BATCH_OPS_MAX + COMPRESSED_MAX;

/// Window of the literals' compression on the main stream, as a power of two: the memory that a decoder spends.
pub const LITERAL_WINDOW_LOG: u32 = 24;
/// Most batches that may wait for their fallback at a time.
pub const PENDING_FALLBACKS_MAX: usize = 4096;
/// Pages of the largest RAM block that can be addressed: the format of QEMU has 52 bits.
pub const GUEST_PAGES_MAX: u64 = 1 << 52;
/// Blocks of the largest disk that can be referred to.
pub const DISK_BLOCKS_MAX: u64 = 1 << 40;
