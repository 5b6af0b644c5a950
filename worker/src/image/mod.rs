//! Disk images as they lie on this host: raw, on a block device, or qcow2 with what it is backed by.
//!
//! ```text
//!   web.qcow2 ─▶ release-7.qcow2 ─▶ debian-12.raw        an image and its layers
//! ```
//! Guarantees: nobody guesses a format, since a guest can write any beginning into a raw disk. The format of a disk is what its definition says, that
//! of what backs it what the qcow2 file above says; QEMU and its tools are told each of them. A chain is checked before it is used.
//!
//! - [`qcow2`]: what the header of a qcow2 file says: pure.
//! - [`convert`]: an image written out as a raw one.

pub mod convert;
pub mod qcow2;

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::qcow2::{HEAD_BYTES, Header, HeaderError};

/// The longest chain, the disk's own file included.
pub const MAX_LAYERS: usize = 32;

/// What a file's bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// They are the disk's.
    #[default]
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl Format {
    /// Of this name; [`None`]: it is not one that can be used.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// Its name, for definitions and for QEMU.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image itself.
    #[error("open the image {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What it is backed by.
    #[error(
        "the image {} is backed by {}, which cannot be opened: put it there, or say where it is now with \
         `qemu-img rebase -u -b PATH -F FORMAT {}`", of.display(), path.display(), of.display()
    )]
    Backing {
        /// The backing file.
        path: PathBuf,
        /// The image that is backed by it.
        of: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The chain has no end.
    #[error(
        "the image {} is backed by itself, by way of {}: say what it is really backed by with `qemu-img rebase -u`",
        path.display(), of.display()
    )]
    Loop {
        /// The image that comes twice.
        path: PathBuf,
        /// The image that names it.
        of: PathBuf,
    },
    /// The chain is long.
    #[error("the image {} has more than {MAX_LAYERS} layers: merge some with `qemu-img commit` or `qemu-img rebase`", path.display())]
    TooDeep {
        /// The image.
        path: PathBuf,
    },
    /// It is not a qcow2 file that can be used.
    #[error("use the image {}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The file.
    pub path: PathBuf,
    /// What its bytes mean.
    pub format: Format,
}

/// An image with everything that it is backed by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    own: Layer,
    /// What is below it, the nearest first.
    backing: Vec<Layer>,
    /// What a qcow2 file says, or how much of a block device is the disk; a raw file may grow.
    virtual_bytes: Option<u64>,
    place: Place,
}

/// What an image lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    File,
    /// The disk is at its beginning.
    Device,
}

impl Image {
    /// A raw one, which need not be there.
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        let own = Layer { path: path.into(), format: Format::Raw };
        Self { own, backing: Vec::new(), virtual_bytes: None, place: Place::File }
    }

    /// The first `size_bytes` of a block device, which need not be there.
    pub fn device(path: impl Into<PathBuf>, size_bytes: u64) -> Self {
        Self { virtual_bytes: Some(size_bytes), place: Place::Device, ..Self::raw(path) }
    }

    /// Of this format, with everything that it is backed by.
    ///
    /// # Errors
    /// [`ImageError`], for a qcow2 file. Whether a raw one is there is not looked at.
    pub fn open(path: &Path, format: Format) -> Result<Self, ImageError> {
        if format == Format::Raw {
            return Ok(Self::raw(path));
        }
        let mut layer = Layer { path: path.to_owned(), format };
        let mut file = File::open(path).map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
        let mut image = Self { own: layer.clone(), ..Self::raw(path) };
        let mut seen = Vec::new();
        loop {
            let of = layer.path.clone();
            seen.push(identity(&file).map_err(|source| ImageError::Open { path: of.clone(), source })?);
            if layer.format == Format::Raw {
                return Ok(image);
            }
            let header = read_header(&file, &of)?;
            image.virtual_bytes.get_or_insert(header.size_bytes);
            let Some(backing) = header.backing else { return Ok(image) };
            if seen.len() == MAX_LAYERS {
                return Err(ImageError::TooDeep { path: path.to_owned() });
            }
            // A relative path is one beside the file that names it.
            let below = of.parent().unwrap_or(Path::new("/")).join(&backing.path);
            let failed = |source| ImageError::Backing { path: below.clone(), of: of.clone(), source };
            file = File::open(&below).map_err(failed)?;
            if seen.contains(&identity(&file).map_err(failed)?) {
                return Err(ImageError::Loop { path: below, of });
            }
            layer = Layer { path: below, format: backing.format };
            image.backing.push(layer.clone());
        }
    }

    /// Its own file.
    pub fn path(&self) -> &Path {
        &self.own.path
    }

    /// What the bytes of its own file mean.
    pub fn format(&self) -> Format {
        self.own.format
    }

    /// Of one on a block device: how much of that is the disk, in bytes.
    pub fn device_bytes(&self) -> Option<u64> {
        self.virtual_bytes.filter(|_| self.place == Place::Device)
    }

    /// Size of the disk, in bytes.
    ///
    /// # Errors
    /// The file of a raw image cannot be looked at.
    pub fn size_bytes(&self) -> io::Result<u64> {
        match self.virtual_bytes {
            Some(size_bytes) => Ok(size_bytes),
            None => Ok(std::fs::metadata(&self.own.path)?.len()),
        }
    }

    /// About how much of the disk is not holes, in bytes: what the files of all layers occupy, but not more than the disk has. Compressed
    /// files hold more than they occupy. A block device has no holes.
    ///
    /// # Errors
    /// A file cannot be looked at.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        if let Some(size_bytes) = self.device_bytes() {
            return Ok(size_bytes);
        }
        let layers = std::iter::once(&self.own).chain(&self.backing);
        let occupied =
            layers.map(|layer| Ok(std::fs::metadata(&layer.path)?.blocks() * 512)).sum::<io::Result<u64>>()?;
        Ok(occupied.min(self.size_bytes()?))
    }

    /// Is there a file that backs it?
    pub fn is_backed(&self) -> bool {
        !self.backing.is_empty()
    }

    /// What a node of its own file has below it, in QEMU's words: opened for reading only, and `null` if there is nothing. [`None`]: the format
    /// knows no such thing.
    pub fn backing_option(&self) -> Option<Value> {
        (self.own.format == Format::Qcow2).then(|| backing_node(&self.backing))
    }

    /// All of it for reading, as one of QEMU's file names.
    pub fn source_name(&self) -> String {
        let mut node = layer_node(&self.own);
        if let Some(backing) = self.backing_option() {
            node["backing"] = backing;
        }
        format!("json:{node}")
    }
}

fn layer_node(Layer { path, format }: &Layer) -> Value {
    let file = json!({"driver": "file", "filename": path.to_string_lossy(), "read-only": true});
    json!({"driver": format.name(), "read-only": true, "file": file})
}

/// The nearest of these layers over all others.
fn backing_node(layers: &[Layer]) -> Value {
    let mut below = Value::Null;
    for layer in layers.iter().rev() {
        let mut node = layer_node(layer);
        if layer.format == Format::Qcow2 {
            // Also `null`: what the file itself says is never followed.
            node["backing"] = below;
        }
        below = node;
    }
    below
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

fn read_header(file: &File, path: &Path) -> Result<Header, ImageError> {
    let mut head = Vec::new();
    let read = file.take(HEAD_BYTES as u64).read_to_end(&mut head);
    read.map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
    Header::parse(&head).map_err(|source| ImageError::Header { path: path.to_owned(), source })
}

/// The size of a qcow2 file's disk, in bytes; what it is backed by is not looked at.
///
/// # Errors
/// [`ImageError`].
pub fn qcow2_bytes(path: &Path) -> Result<u64, ImageError> {
    let file = File::open(path).map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
    Ok(read_header(&file, path)?.size_bytes)
}

/// Does a file begin as a qcow2 file does?
///
/// # Errors
/// It cannot be read.
pub fn begins_like_qcow2(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(qcow2::MAGIC.len() as u64).read_to_end(&mut head)?;
    Ok(head == qcow2::MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A qcow2 file as `qemu-img` makes it.
    fn create(folder: &Path, name: &str, backing: Option<(&str, &str)>) -> PathBuf {
        let path = folder.join(name);
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-u", "-f", "qcow2"]);
        if let Some((backing, format)) = backing {
            command.args(["-b", backing, "-F", format]);
        }
        let made = command.arg(&path).arg("1M").status().unwrap();
        assert!(made.success());
        path
    }

    #[test]
    fn a_chain_is_opened_layer_by_layer_and_told_whole() {
        let folder = tempfile::tempdir().unwrap();
        let sub = folder.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        std::fs::write(folder.path().join("base.raw"), vec![1; 1 << 20]).unwrap();
        create(&sub, "middle.qcow2", Some(("../base.raw", "raw")));
        let top = create(folder.path(), "top.qcow2", Some(("sub/middle.qcow2", "qcow2")));
        let image = Image::open(&top, Format::Qcow2).unwrap();
        assert_eq!((image.size_bytes().unwrap(), image.format()), (1 << 20, Format::Qcow2));
        assert_eq!(image.allocated_bytes().unwrap(), 1 << 20);
        let name = image.source_name();
        let node: Value = serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
        let (middle, base) = (&node["backing"], &node["backing"]["backing"]);
        assert_eq!(
            (&node["driver"], &middle["driver"], &base["driver"]),
            (&json!("qcow2"), &json!("qcow2"), &json!("raw"))
        );
        assert!(base["file"]["filename"].as_str().unwrap().ends_with("sub/../base.raw"), "{base}");
        assert!(base.get("backing").is_none() && base["read-only"] == true);
    }

    #[test]
    fn an_image_without_a_backing_file_says_so_to_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let path = create(folder.path(), "alone.qcow2", None);
        assert_eq!(Image::open(&path, Format::Qcow2).unwrap().backing_option(), Some(Value::Null));
        assert_eq!(Image::raw(&path).backing_option(), None);
    }

    #[test]
    fn a_chain_that_is_broken_or_endless_is_refused_with_the_fix() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| crate::error::with_causes(&Image::open(path, Format::Qcow2).unwrap_err());
        let missing = refused(&create(folder.path(), "a.qcow2", Some(("gone.raw", "raw"))));
        assert!(missing.contains("gone.raw") && missing.contains("qemu-img rebase -u"), "{missing}");
        create(folder.path(), "b.qcow2", Some(("c.qcow2", "qcow2")));
        let round = refused(&create(folder.path(), "c.qcow2", Some(("b.qcow2", "qcow2"))));
        assert!(round.contains("backed by itself"), "{round}");
        for n in 0..=MAX_LAYERS {
            create(
                folder.path(),
                &format!("{n}.qcow2"),
                (n > 0).then(|| format!("{}.qcow2", n - 1)).as_deref().map(|below| (below, "qcow2")),
            );
        }
        assert!(Image::open(&folder.path().join(format!("{}.qcow2", MAX_LAYERS - 1)), Format::Qcow2).is_ok());
        let deep = refused(&folder.path().join(format!("{MAX_LAYERS}.qcow2")));
        assert!(deep.contains("more than 32 layers"), "{deep}");
        std::fs::write(folder.path().join("raw"), [0; 4096]).unwrap();
        let other = refused(&folder.path().join("raw"));
        assert!(other.contains("not a qcow2 file"), "{other}");
    }
}
