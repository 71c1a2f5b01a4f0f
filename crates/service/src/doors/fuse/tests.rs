//! The dispatcher, given what no kernel would send.

use std::fs::File;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::fault::Fault;
use polytropo_libservices::stack::{DirCoherence, DirLayer, FaultLayer, FaultRule, Layer, Ownership};
use polytropo_libservices::{DoorId, Errno, Error, Libservice, Name, NodeId};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    self, CreateIn, EntryOut, InHeader, InitFlags, InitInMore, InitInShort, OpenOut, OutHeader, WriteIn,
    opcode,
};
use super::reply::{Held, Reply};
use super::request::Request;
use super::session::{Answer, Own, Session};
use super::{FuseOptions, device};

/// A session over a scratch directory, and what a thread of it has.
struct Bench {
    session: Session,
    payload: Vec<u8>,
    held: Vec<Held>,
    own: Own,
    _scratch: Option<tempfile::TempDir>,
}

impl Bench {
    fn over(stack: Arc<dyn Libservice>, scratch: Option<tempfile::TempDir>) -> Self {
        let session = Session::new(stack, DoorId(1), FuseOptions::default());
        Self {
            own: Own::new(&session),
            session,
            payload: vec![0; device::PAYLOAD_BYTES_MAX],
            held: Vec::new(),
            _scratch: scratch,
        }
    }

    fn over_directory() -> Self {
        Self::over_faulty_directory(vec![])
    }

    fn over_faulty_directory(rules: Vec<FaultRule>) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let layer = DirLayer {
            path: scratch.path().into(),
            read_only: false,
            coherence: DirCoherence::Exclusive,
            ownership: Ownership::Native,
        };
        let dir = Arc::new(Dir::new(File::open(scratch.path()).unwrap().into(), &layer).unwrap());
        if rules.is_empty() {
            return Self::over(dir, Some(scratch));
        }
        let config = FaultLayer { below: Box::new(Layer::Dir(layer)), rules, seed: 0 };
        Self::over(Arc::new(Fault::new(dir, &config).unwrap()), Some(scratch))
    }

    /// `None` when it is not even a message; else the answer and its payload.
    fn send(&mut self, message: &[u8]) -> Option<(Answer, Vec<u8>)> {
        let request = Request::parse(message)?;
        let mut reply = Reply::new(&mut self.payload, &mut self.held);
        let answer = self.session.answer(request, &mut reply, &self.own);
        let len = reply.len();
        Some((answer, self.payload[..len].to_vec()))
    }

    fn init(&mut self) {
        let offer = InitInShort { major: 7, minor: 45, max_readahead: 1 << 17, flags: u32::MAX };
        let more = InitInMore { flags2: (InitFlags::all().bits() >> 32) as u32, unused: [0; 11] };
        let (answer, _) = self.send(&message(opcode::INIT, 0, &[offer.as_bytes(), more.as_bytes()])).unwrap();
        assert_eq!(answer, Answer::Payload);
    }
}

fn message(opcode: u32, nodeid: u64, arguments: &[&[u8]]) -> Vec<u8> {
    let arguments = arguments.concat();
    let header = InHeader {
        len: (size_of::<InHeader>() + arguments.len()) as u32,
        opcode,
        unique: 2,
        nodeid,
        uid: 0,
        gid: 0,
        pid: 1,
        total_extlen: 0,
        padding: 0,
    };
    [header.as_bytes(), &arguments].concat()
}

/// A small deterministic generator.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Bytes of which many are small, as in real arguments.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let sparse = self.below(2) == 0;
        std::iter::repeat_with(|| if sparse && self.below(4) > 0 { 0 } else { self.next() as u8 })
            .take(len)
            .collect()
    }
}

/// The files are real ones: lengths that would fill the disk are cut to 64 KiB.
fn keep_small(opcode: u32, arguments: &mut [u8]) {
    let length_at = match opcode {
        opcode::FALLOCATE => 16,
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => 40,
        _ => return,
    };
    if let Some(upper) = arguments.get_mut(length_at + 2..length_at + 8) {
        upper.fill(0);
    }
}

#[test]
fn nothing_that_is_sent_makes_the_door_panic() {
    let mut bench = Bench::over_directory();
    bench.init();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut whole, mut answered) = (0, 0);
    for _ in 0..60_000 {
        let len = dice.below(200) as usize;
        let mut arguments = dice.bytes(len);
        let sent = match dice.below(8) {
            0 => dice.bytes(len),
            _ => {
                let (opcode, node) = (dice.below(60) as u32, dice.below(4));
                keep_small(opcode, &mut arguments);
                let mut sent = message(opcode, node, &[&arguments]);
                if dice.below(8) == 0 {
                    let cut = dice.below(sent.len() as u64) as usize;
                    sent.truncate(cut);
                }
                sent
            }
        };
        if let Some((answer, payload)) = bench.send(&sent) {
            whole += 1;
            answered += usize::from(answer == Answer::Payload);
            assert!(payload.len() <= device::PAYLOAD_BYTES_MAX);
            bench.session.abandon(&mut bench.held);
        }
    }
    assert!(!bench.session.has_panicked());
    assert!(
        whole > 40_000 && answered > 1_000,
        "the messages were too wild to test much: {whole}, {answered}"
    );
}

#[test]
fn what_is_not_a_message_is_told_apart() {
    let mut bench = Bench::over_directory();
    assert!(bench.send(b"short").is_none());
    let mut wrong_length = message(opcode::GETATTR, 1, &[&[0; 16]]);
    wrong_length[0] += 1;
    assert!(bench.send(&wrong_length).is_none());
    let mut long_extension = message(opcode::GETATTR, 1, &[&[0; 16]]);
    long_extension[36] = 200;
    assert!(bench.send(&long_extension).is_none());
}

#[test]
fn nothing_is_done_before_init_and_init_comes_once() {
    let mut bench = Bench::over_directory();
    let statfs = message(opcode::STATFS, 1, &[]);
    assert_eq!(bench.send(&statfs).unwrap().0, Answer::Error(Errno::PROTO));
    bench.init();
    assert_eq!(bench.send(&statfs).unwrap().0, Answer::Payload);
    let again = InitInShort { major: 7, minor: 45, max_readahead: 0, flags: 0 };
    let again = message(opcode::INIT, 0, &[again.as_bytes()]);
    assert_eq!(bench.send(&again).unwrap().0, Answer::Error(Errno::PROTO));
}

#[test]
fn a_larger_answer_than_the_kernel_takes_is_an_error() {
    let mut bench = Bench::over_directory();
    bench.init();
    // One byte of room for a directory's entries.
    let asked =
        super::abi::ReadIn { fh: 0, offset: 0, size: 1, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
    let (answer, payload) = bench.send(&message(opcode::READDIR, 1, &[asked.as_bytes()])).unwrap();
    assert!(answer == Answer::Payload && payload.is_empty());
    assert_eq!(size_of::<OutHeader>(), 16);
}

/// A layer with a fault in it.
struct Broken;

impl Libservice for Broken {
    fn kind(&self) -> &'static str {
        "broken"
    }

    fn lookup(
        &self,
        _caller: &polytropo_libservices::Caller,
        _parent: NodeId,
        _name: &Name,
    ) -> polytropo_libservices::Result<polytropo_libservices::Entry> {
        if _name.as_bytes() == b"panic" {
            panic!("as the test wants it")
        }
        Err(Error::new(Errno::NOENT, "look up a name"))
    }
}

#[test]
fn a_panic_in_a_layer_is_an_error_to_the_program_only() {
    let mut bench = Bench::over(Arc::new(Broken), None);
    bench.init();
    let lookup = |name: &[u8]| message(opcode::LOOKUP, 1, &[name]);
    assert_eq!(bench.send(&lookup(b"panic\0")).unwrap().0, Answer::Error(Errno::IO));
    assert!(bench.session.has_panicked());
    assert_eq!(bench.send(&lookup(b"other\0")).unwrap().0, Answer::Error(Errno::NOENT));
}

#[test]
fn bytes_that_are_written_back_are_never_interrupted() {
    let interrupted = |times, errno: &str| FaultRule {
        operation: "write".into(),
        after: 0,
        times,
        probability: 1.0,
        errno: Some(errno.into()),
        delay_ms: 0,
        kill: false,
        short_bytes: None,
    };
    let cases = [
        (interrupted(3, "EINTR"), Answer::Payload),
        (interrupted(3, "EAGAIN"), Answer::Payload),
        (interrupted(0, "EINTR"), Answer::Error(Errno::IO)),
        (interrupted(0, "ENOSPC"), Answer::Error(Errno::NOSPC)),
    ];
    for (rule, wanted) in cases {
        let mut bench = Bench::over_faulty_directory(vec![rule.clone()]);
        bench.init();
        let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_644, umask: 0, open_flags: 0 };
        let (answer, made) = bench.send(&message(opcode::CREATE, 1, &[create.as_bytes(), b"f\0"])).unwrap();
        assert_eq!(answer, Answer::Payload);
        let (entry, rest) = EntryOut::read_from_prefix(&made).unwrap();
        let (open, _) = OpenOut::read_from_prefix(rest).unwrap();
        let write = WriteIn {
            fh: open.fh,
            offset: 0,
            size: 5,
            write_flags: abi::WRITE_CACHE,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        };
        let (answer, _) =
            bench.send(&message(opcode::WRITE, entry.nodeid, &[write.as_bytes(), b"bytes"])).unwrap();
        assert_eq!(answer, wanted, "{rule:?}");
    }
}
