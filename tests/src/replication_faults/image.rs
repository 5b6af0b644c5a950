//! What images of the guest's disks are worth: whether the file system is sound once its journal is replayed, and of which moment of the history they are.
//!
//! Everything here blocks, and changes the image with the file system: give it a copy.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_guest::history::{self, BLOCKS_FILE, RECORDS_FILE};

/// What was found.
#[derive(Clone, Debug)]
pub struct Findings {
    /// What the file system's check complains about; [`None`]: nothing.
    pub unsound: Option<String>,
    /// Operations of the history that are complete, or why it is of no single moment.
    pub moment: Result<u64, String>,
}

/// Copies a file, leaving out holes.
///
/// # Errors
/// When it cannot be copied.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    run(Command::new("cp").args(["--archive", "--sparse=always"]).arg(from).arg(to)).map(drop)
}

/// Replays the journal of the file system in an image, checks it, and looks for the history of this seed, of whose blocks a part lies on other
/// disks: images of them, in the order in which the history was given them.
///
/// # Errors
/// When the tools cannot be run.
pub fn examine(image: &Path, disks: &[PathBuf], seed: u64) -> io::Result<Findings> {
    let replay = fsck(image, &["-p", "-E", "journal_only"])?;
    let check = fsck(image, &["-f", "-n"])?;
    let unsound = check.err().map(|said| match replay {
        Ok(()) => said,
        Err(replay) => format!("{replay}; {said}"),
    });
    let on_disks = (1..).zip(disks).map(|(place, disk)| beginning(disk, history::place_bytes(place, disks.len() + 1)));
    let places: io::Result<Vec<_>> = std::iter::once(dump(image, BLOCKS_FILE)).chain(on_disks).collect();
    let moment = match (dump(image, RECORDS_FILE), places) {
        (Ok(records), Ok(places)) => history::moment(seed, &records, &places).map_err(|mixture| mixture.to_string()),
        (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
    };
    Ok(Findings { unsound, moment })
}

fn beginning(disk: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    File::open(disk)?.take(bytes).read_to_end(&mut read)?;
    Ok(read)
}

/// Digest of a whole file; holes are zeros.
///
/// # Errors
/// When it cannot be read.
pub fn digest(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

/// What it said, unless it found nothing.
fn fsck(image: &Path, arguments: &[&str]) -> io::Result<Result<(), String>> {
    let output = Command::new(SBIN[0]).args(arguments).arg(image).output()?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok(Err(format!("e2fsck {} ({}): {}", arguments.join(" "), output.status, said.trim())))
}

/// They lie where only root looks.
const SBIN: [&str; 2] = ["/usr/sbin/e2fsck", "/usr/sbin/debugfs"];

/// Reads a file out of an image.
fn dump(image: &Path, name: &str) -> io::Result<Vec<u8>> {
    let to = image.with_extension("dump");
    // It may be there from an earlier call.
    fs::remove_file(&to).ok();
    let output = run(Command::new(SBIN[1]).args(["-R", &format!("dump /{name} {}", to.display())]).arg(image))?;
    // It ends with 0 whatever it found.
    let content =
        fs::read(&to).map_err(|error| io::Error::other(format!("find {name}: {error}: {}", output.trim())))?;
    fs::remove_file(&to)?;
    Ok(content)
}

/// What it said on standard error.
fn run(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(said) } else { Err(io::Error::other(said.trim().to_owned())) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use pageport_guest::history::{History, Plan};

    use super::*;

    const SEED: u64 = 5;

    /// Two images with a history of a few operations in them, and how many.
    fn images(folder: &Path) -> (PathBuf, PathBuf, u64) {
        let (content, disk) = (folder.join("content"), folder.join("disk.raw"));
        File::create(&disk).unwrap().set_len(4 << 20).unwrap();
        let plan = Plan { operations_per_second: 100_000, seed: SEED, trim_every: 0, disks: vec![disk.clone()] };
        let load = History::start(&content, plan).unwrap();
        while load.fares().done < 30 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let done = load.stop().unwrap().done;
        let image = folder.join("image.raw");
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
        run(Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-F", "-b", "4096", "-d"]).arg(&content).arg(&image))
            .unwrap();
        (image, disk, done)
    }

    #[test]
    fn a_sound_image_shows_its_moment_and_a_damaged_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (image, disk, done) = images(folder.path());
        let (disks, stale) = ([disk], folder.path().join("stale.raw"));
        let found = examine(&image, &disks, SEED).unwrap();
        assert_eq!((found.unsound, found.moment), (None, Ok(done)));
        assert!(examine(&image, &disks, SEED + 1).unwrap().moment.is_err(), "it is of another history");
        File::create(&stale).unwrap().set_len(4 << 20).unwrap();
        assert!(examine(&image, &[stale], SEED).unwrap().moment.is_err(), "one disk is of another moment");

        let copied = folder.path().join("copy.raw");
        copy(&image, &copied).unwrap();
        assert_eq!(digest(&image).unwrap(), digest(&copied).unwrap());
        run(Command::new("/usr/sbin/debugfs").args(["-w", "-R", "clri /load/history-records"]).arg(&copied)).unwrap();
        let found = examine(&copied, &disks, SEED).unwrap();
        assert!(found.unsound.is_some() && found.moment.is_err(), "{found:?}");
        assert_ne!(digest(&image).unwrap(), digest(&copied).unwrap());
    }
}
