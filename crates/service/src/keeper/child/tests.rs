use super::*;

struct Nobody;

impl Watcher for Nobody {
    fn door_ended(&self, _worker: &Child, door: u64) -> bool {
        door == 1
    }
    fn worker_ended(&self, _: &Arc<Child>) {}
}

/// A process that stands for a worker, and its end of the link.
fn impostor() -> (std::process::Child, Arc<Child>, Link) {
    let (process, child, theirs) = unheard();
    child.listen(Arc::new(Nobody)).unwrap();
    (process, child, theirs)
}

fn unheard() -> (std::process::Child, Arc<Child>, Link) {
    let process = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&process);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let (ours, theirs) = Link::pair().unwrap();
    let child = Arc::new(Child {
        pid: process.id(),
        pidfd,
        ids: Ids::Same { count: 1 },
        windows: OnceLock::new(),
        namespace: OnceLock::new(),
        link: ours,
        mounts: Mutex::default(),
        keeping: Keeping::default(),
        sending: Mutex::new(()),
        waiting: Mutex::default(),
        last_request: AtomicU64::new(0),
        alive: AtomicBool::new(true),
        blame: AtomicU64::new(0),
        hears: Default::default(),
    });
    (process, child, theirs)
}

#[test]
fn a_worker_that_breaks_the_protocol_is_ended() {
    let breaches: [fn(&Link); 6] = [
        |link| link.send(&"nonsense", &[]).unwrap(),
        |link| link.send(&Report::Ready {}, &[]).unwrap(),
        |link| link.send(&Report::Ended { door: 7, problem: None }, &[]).unwrap(),
        |link| link.send(&Report::Done { request: 9, problem: None }, &[]).unwrap(),
        |link| link.send(&Report::Ended { door: 1, problem: None }, &[link.as_fd()]).unwrap(),
        |link| {
            let _ = rustix::net::send(link, &[b'{'; 65_537], rustix::net::SendFlags::empty());
        },
    ];
    for breach in breaches {
        let (mut process, _child, link) = impostor();
        breach(&link);
        assert!(!process.wait().unwrap().success());
    }
}

/// Counts doors that ended.
#[derive(Default)]
struct Counts(AtomicU64);

impl Watcher for Counts {
    fn door_ended(&self, _worker: &Child, _door: u64) -> bool {
        self.0.fetch_add(1, SeqCst);
        true
    }
    fn worker_ended(&self, _: &Arc<Child>) {}
}

#[test]
fn what_a_worker_said_before_it_died_is_heard_though_it_read_not_all() {
    let counts = Arc::new(Counts::default());
    let (mut process, child, link) = unheard();
    for door in 0..20 {
        link.send(&Report::Ended { door, problem: None }, &[]).unwrap();
    }
    child.link.send(&Task::Roots {}, &[]).unwrap();
    drop(link);
    child.listen(counts.clone()).unwrap();
    process.wait().unwrap();
    child.hears.1.wait_while(&mut child.hears.0.lock(), |hears| *hears);
    assert_eq!(counts.0.load(SeqCst), 20);
}

#[test]
fn a_worker_that_keeps_to_it_is_answered() {
    let (mut process, child, link) = impostor();
    let asker = std::thread::spawn({
        let child = child.clone();
        move || child.statistics(Some(3))
    });
    let Some((Task::Statistics { request, door: Some(3) }, _)) = link.receive().unwrap() else { panic!() };
    link.send(&Report::Ended { door: 1, problem: Some("\u{1b}[2J".into()) }, &[]).unwrap();
    link.send(&Report::Done { request, problem: Some("\u{1b}no".into()) }, &[]).unwrap();
    assert_eq!(asker.join().unwrap().unwrap_err().sentence, "?no");
    // Too late, but asked for.
    link.send(&Report::Done { request, problem: None }, &[]).unwrap();
    assert!(process.try_wait().unwrap().is_none());
    child.kill();
    process.wait().unwrap();
}

#[test]
fn only_faults_of_its_own_are_blamed_on_requests() {
    let ended = |raw| blame_of(&Ok(Some(ExitStatus::from_raw(raw))));
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGSYS, libc::SIGSEGV | 0x80] {
        assert_eq!(ended(signal), BLAME_OF_FAULT, "{signal}");
    }
    assert_eq!(ended(101 << 8), BLAME_OF_FAULT, "a panic");
    for signal in [0, libc::SIGKILL, libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
        assert_eq!(ended(signal), BLAME_OF_KILL, "{signal}");
    }
    assert_eq!(blame_of(&Ok(None)), BLAME_OF_KILL);
}
