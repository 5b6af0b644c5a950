//! Which accelerator really runs guests here, and what QEMU is installed.
//!
//! `/dev/kvm` may open and yet hang guests as soon as they enter 64-bit mode (seen under nested virtualisation, where
//! real and protected mode still work), so [`probe`] tries: it boots a few bytes of firmware of our own that set up page
//! tables, enter long mode, and leave through `isa-debug-exit`. Only that exit code is proof; anything else,
//! or nothing within [`PROBE_DEADLINE`], means software emulation.
//!
//! Does not judge speed, and does not look at CPU models.

use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Time that a guest has to prove itself.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(3);
/// Time that `qemu --version` has.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);
/// First QEMU whose software emulation does not lose dirty pages in a live move.
pub const FIRST_SOUND_TCG: u32 = 9;

/// Size of the firmware image; QEMU maps its end to the end of the first MiB and of the fourth GiB.
const FIRMWARE_BYTES: usize = 64 * 1024;
/// Where the CPU starts, in the image.
const RESET_VECTOR: usize = FIRMWARE_BYTES - 16;
/// `isa-debug-exit` turns the written value v into the exit code 2v + 1.
const PROOF_VALUE: u8 = 0x21;
const PROOF_EXIT_CODE: i32 = 2 * PROOF_VALUE as i32 + 1;

/// From the start of segment f000 on. Page tables lie at 0x1000 to 0x3fff: one 2 MiB page maps everything used.
#[rustfmt::skip]
const FIRMWARE: &[u8] = &[
    // .code16
    0xfa, 0xfc,                                     //       cli; cld
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0,             //       xor ax, ax; mov ds, ax; mov es, ax
    0xbf, 0x00, 0x10, 0xb9, 0x00, 0x18, 0xf3, 0xab, //       mov di, 0x1000; mov cx, 0x1800; rep stosw
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20,             //       mov word [0x1000], 0x2003    PML4 -> PDPT
    0xc7, 0x06, 0x00, 0x20, 0x03, 0x30,             //       mov word [0x2000], 0x3003    PDPT -> PD
    0xc7, 0x06, 0x00, 0x30, 0x83, 0x00,             //       mov word [0x3000], 0x0083    PD: 2 MiB at 0
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x80, 0x00,       //       lgdt cs:[0x80]
    0x0f, 0x20, 0xe0, 0x0c, 0x20, 0x0f, 0x22, 0xe0, //       mov eax, cr4; or al, 0x20; mov cr4, eax    PAE
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00,             //       mov eax, 0x1000
    0x0f, 0x22, 0xd8,                               //       mov cr3, eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,             //       mov ecx, 0xc0000080          EFER
    0x0f, 0x32, 0x80, 0xcc, 0x01, 0x0f, 0x30,       //       rdmsr; or ah, 1; wrmsr       long mode enable
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x80,             //       mov eax, 0x80000001          paging, protection
    0x0f, 0x22, 0xc0,                               //       mov cr0, eax
    0x66, 0xea, 0x58, 0x00, 0x0f, 0x00, 0x08, 0x00, //       jmp far 8:0xf0058
    // .code64, at 0x58
    0x48, 0xc7, 0xc4, 0x00, 0x40, 0x00, 0x00,       //       mov rsp, 0x4000
    0x6a, 0x50, 0x58,                               //       push 0x50; pop rax           a write through the page table
    0xb0, PROOF_VALUE, 0xe6, 0xf4,                  //       mov al, PROOF_VALUE; out 0xf4, al
    0xf4, 0xeb, 0xfd,                               //       1: hlt; jmp 1b
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,       //       (to 0x70)
    0, 0, 0, 0, 0, 0, 0, 0,                         //       gdt: null
    0, 0, 0, 0, 0, 0x9a, 0x20, 0,                   //       gdt: 64-bit code
    0x0f, 0x00, 0x70, 0x00, 0x0f, 0x00,             // 0x80: limit 15, base 0xf0070
];
/// `jmp far f000:0000`
const RESET_JUMP: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The CPU's own virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// QEMU's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// From QEMU's name of it.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accelerator| accelerator.as_str() == name)
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// QEMU's version; compares in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// As in 10.0.2: 10.
    pub major: u32,
    /// As in 10.0.2: 0.
    pub minor: u32,
    /// As in 10.0.2: 2.
    pub micro: u32,
}

impl QemuVersion {
    /// From `10.0.2`; what follows is left out.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        Some(Self { major: parts.next()??, minor: parts.next()??, micro: parts.next().flatten().unwrap_or(0) })
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Why nothing is known about the installed QEMU.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// It did not start.
    #[error("run {qemu}: install QEMU or set hypervisor.qemu")]
    Run {
        /// The binary.
        qemu: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not end.
    #[error("{qemu} --version did not end in time")]
    Deadline {
        /// The binary.
        qemu: String,
    },
    /// It said something else.
    #[error("no version in what {qemu} --version says: {output:?}")]
    NoVersion {
        /// The binary.
        qemu: String,
        /// The start of its words.
        output: String,
    },
    /// The firmware image could not be written.
    #[error("write the probe's firmware image")]
    Firmware {
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Asks the binary for its version.
pub async fn qemu_version(qemu: &str) -> Result<QemuVersion, AccelError> {
    let run = Command::new(qemu).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_DEADLINE, run)
        .await
        .map_err(|_| AccelError::Deadline { qemu: qemu.to_owned() })?
        .map_err(|source| AccelError::Run { qemu: qemu.to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text)
        .ok_or_else(|| AccelError::NoVersion { qemu: qemu.to_owned(), output: text.chars().take(120).collect() })
}

fn parse_version(text: &str) -> Option<QemuVersion> {
    QemuVersion::parse(text.split_once("version ")?.1.split_whitespace().next()?)
}

/// Finds the accelerator by trying; `scratch` is a folder for the firmware image.
pub async fn probe(qemu: &str, scratch: &Path) -> Result<Accelerator, AccelError> {
    let works = runs_long_mode(qemu, Accelerator::Kvm, scratch).await?;
    tracing::info!(kvm_runs_guests = works, "accelerator probed");
    Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// Does a guest that enters 64-bit mode get anywhere?
pub async fn runs_long_mode(qemu: &str, accelerator: Accelerator, scratch: &Path) -> Result<bool, AccelError> {
    let image = scratch.join(format!("accel-probe-{}-{accelerator}.bin", std::process::id()));
    tokio::fs::write(&image, firmware_image()).await.map_err(|source| AccelError::Firmware { source })?;
    let child = Command::new(qemu)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-m", "16", "-machine"])
        .arg(format!("q35,accel={accelerator}"))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-bios"])
        .arg(&image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let proven = match child {
        Ok(mut child) => {
            let ended = tokio::time::timeout(PROBE_DEADLINE, child.wait()).await;
            if ended.is_err() {
                // It hangs: end it and reap it.
                let _ = child.kill().await;
            }
            Ok(matches!(ended, Ok(Ok(status)) if status.code() == Some(PROOF_EXIT_CODE)))
        }
        Err(source) => Err(AccelError::Run { qemu: qemu.to_owned(), source }),
    };
    let _ = tokio::fs::remove_file(&image).await;
    proven
}

fn firmware_image() -> Vec<u8> {
    let mut image = vec![0xf4; FIRMWARE_BYTES];
    image[..FIRMWARE.len()].copy_from_slice(FIRMWARE);
    image[RESET_VECTOR..RESET_VECTOR + RESET_JUMP.len()].copy_from_slice(&RESET_JUMP);
    image
}

/// The reason why a live move from or to such a hypervisor is refused, if there is one.
pub fn refuse_live_move(version: QemuVersion, accelerator: Accelerator) -> Option<String> {
    let unsound = accelerator == Accelerator::Tcg && version.major < FIRST_SOUND_TCG;
    unsound.then(|| {
        format!(
            "QEMU {version} with software emulation loses dirty pages in a live migration: install QEMU \
             {FIRST_SOUND_TCG} or newer, or use KVM"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_qemu_prints() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c)";
        assert_eq!(parse_version(debian), Some(QemuVersion { major: 10, minor: 0, micro: 2 }));
        assert_eq!(parse_version("QEMU emulator version 9.2"), Some(QemuVersion { major: 9, minor: 2, micro: 0 }));
        for text in ["", "version", "version x.y", "QEMU emulator version 9"] {
            assert_eq!(parse_version(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_old_software_emulation_is_refused() {
        let old = QemuVersion { major: 7, minor: 2, micro: 0 };
        let new = QemuVersion { major: 9, minor: 0, micro: 0 };
        assert!(refuse_live_move(old, Accelerator::Tcg).is_some_and(|reason| reason.contains("7.2.0")));
        assert_eq!(refuse_live_move(old, Accelerator::Kvm), None);
        assert_eq!(refuse_live_move(new, Accelerator::Tcg), None);
    }

    #[test]
    fn the_firmware_has_its_parts_where_the_code_expects_them() {
        assert_eq!(&FIRMWARE[0x50..0x58], [0x66, 0xea, 0x58, 0, 0x0f, 0, 8, 0], "the far jump");
        assert_eq!(&FIRMWARE[0x78..0x80], [0, 0, 0, 0, 0, 0x9a, 0x20, 0], "the code segment");
        assert_eq!(&FIRMWARE[0x80..0x86], [0x0f, 0, 0x70, 0, 0x0f, 0], "the table's limit and base");
    }
}
