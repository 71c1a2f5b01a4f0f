//! The socket's two messages.
//!
//! The program sends a [`Hello`] with one descriptor: an `O_PATH` open of the mount's root, which proves that it can reach it.
//! The service answers with a [`Welcome`]; of [`Verdict::Welcome`] come five descriptors with it, in the order of [`Descriptor`].

use crate::VERSION;

pub const HELLO_BYTES: usize = 32;
pub const WELCOME_BYTES: usize = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"polytro1");

/// Descriptors that come with a welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Descriptor {
    /// The channel's memory.
    Channel = 0,
    /// An eventfd: rung when the service sleeps.
    Bell = 1,
    /// The directory of windows, through a read-only mount.
    Windows = 2,
    /// The table of epochs.
    Epochs = 3,
    /// Answers that programs of the same rights share.
    Answers = 4,
}
pub const WELCOME_DESCRIPTORS: usize = 5;

/// What a program says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub version: u32,
}

impl Hello {
    pub fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        put(&mut bytes, 0, &MAGIC.to_le_bytes());
        put(&mut bytes, 8, &self.version.to_le_bytes());
        bytes
    }

    /// None for what is no hello at all.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != HELLO_BYTES || word64(bytes, 0)? != MAGIC {
            return None;
        }
        Some(Self { version: word32(bytes, 8)? })
    }
}

impl Default for Hello {
    fn default() -> Self {
        Self { version: VERSION }
    }
}

macro_rules! verdicts {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $sentence:literal;)*) => {
        /// Whether a program gets a channel; if not, it goes through the kernel as if there were none.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Verdict {
            $($(#[$doc])* $name = $number,)*
        }

        impl Verdict {
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// For logs and counters.
            pub fn sentence(self) -> &'static str {
                match self {
                    $(Self::$name => $sentence,)*
                }
            }
        }
    };
}

verdicts! {
    Welcome = 0, "the channel is open";
    OtherVersion = 1, "the service speaks another version of the protocol";
    Malformed = 2, "the first message made no sense";
    NotOurs = 3, "the descriptor is no root of a mount that this service serves and the process sees";
    /// Part of the filesystem is mounted, not its root.
    NotTheRoot = 4, "only a part of the filesystem is mounted there";
    /// Its ids are those of another user namespace.
    OtherUserNamespace = 5, "the process is in another user namespace than the service";
    /// It may be under Landlock, whose rules nobody else can read.
    NoNewPrivileges = 6, "the process has given up new privileges and may be confined in ways that the service cannot see";
    /// Ids or capabilities are of a kind that the kernel weighs and this door does not.
    UnusualCredentials = 7, "the process has unusual credentials";
    Gone = 8, "the process ended or changed while it was looked at";
    TooMany = 9, "the service has too many channels";
    Failed = 10, "the service could not open a channel";
    /// Too many mounts inside of the mount.
    TooManyMounts = 11, "too many filesystems are mounted inside of it";
}

/// What the service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    pub version: u32,
    /// A number of [`Verdict`].
    pub verdict: u32,
    /// Bytes of the channel's memory.
    pub channel_bytes: u64,
    /// `st_dev` of the mount, and the mount's number, as statx(2) tells them.
    pub device: u64,
    pub mount_id: u64,
    /// Bytes of the table of epochs; 0: there is none, and its descriptor is of no use.
    pub epochs_bytes: u64,
    /// Bytes of the shared answers; 0: there are none, and their descriptor is of no use.
    pub answers_bytes: u64,
}

impl Welcome {
    pub fn refusal(verdict: Verdict) -> Self {
        Self {
            version: VERSION,
            verdict: verdict as u32,
            channel_bytes: 0,
            device: 0,
            mount_id: 0,
            epochs_bytes: 0,
            answers_bytes: 0,
        }
    }

    pub fn to_bytes(self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        put(&mut bytes, 0, &MAGIC.to_le_bytes());
        put(&mut bytes, 8, &self.version.to_le_bytes());
        put(&mut bytes, 12, &self.verdict.to_le_bytes());
        put(&mut bytes, 16, &self.channel_bytes.to_le_bytes());
        put(&mut bytes, 24, &self.device.to_le_bytes());
        put(&mut bytes, 32, &self.mount_id.to_le_bytes());
        put(&mut bytes, 40, &self.epochs_bytes.to_le_bytes());
        put(&mut bytes, 48, &self.answers_bytes.to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != WELCOME_BYTES || word64(bytes, 0)? != MAGIC {
            return None;
        }
        Some(Self {
            version: word32(bytes, 8)?,
            verdict: word32(bytes, 12)?,
            channel_bytes: word64(bytes, 16)?,
            device: word64(bytes, 24)?,
            mount_id: word64(bytes, 32)?,
            epochs_bytes: word64(bytes, 40)?,
            answers_bytes: word64(bytes, 48)?,
        })
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let hello = Hello::default();
        assert_eq!(Hello::from_bytes(&hello.to_bytes()), Some(hello));
        assert_eq!(Hello::from_bytes(&[0; HELLO_BYTES]), None);
        assert_eq!(Hello::from_bytes(&hello.to_bytes()[..31]), None);
        let welcome =
            Welcome { device: 7, mount_id: 9, answers_bytes: 5, ..Welcome::refusal(Verdict::NotTheRoot) };
        assert_eq!(Welcome::from_bytes(&welcome.to_bytes()), Some(welcome));
        assert_eq!(Verdict::from_number(welcome.verdict), Some(Verdict::NotTheRoot));
        assert_eq!(Verdict::from_number(99), None);
    }
}
