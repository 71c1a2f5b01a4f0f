//! Engines of plans, and times that are measured.

use polytropo_copy::engine::Engine;
use polytropo_copy::features::Features;
use polytropo_copy::plan::{Context, Plan, SITUATIONS};

#[test]
fn engines_copy_every_size_in_every_situation() {
    let features = Features::detect();
    let source: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    for context in [Context::Plain, Context::Keep] {
        let engine = Engine::new(&Plan::default_for(features), context, features).expect("an engine");
        for (situation, name) in SITUATIONS {
            for size in (0..200).chain([255, 256, 4096, 5000, 65_536, 300_000, 1 << 20]) {
                let mut destination = vec![0; size];
                // SAFETY: both have that size.
                unsafe { engine.copy(destination.as_mut_ptr(), source.as_ptr(), size, situation) };
                assert_eq!(destination, source[..size], "{name}, {size} bytes");
            }
        }
    }
}

#[cfg(all(feature = "std", target_arch = "x86_64"))]
#[test]
fn times_are_measured_for_every_contender_in_every_round() {
    use polytropo_copy::measure::{Bench, Contender};
    // SAFETY: a set of this size, of our own thread.
    let cpus: Vec<usize> = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        assert_eq!(libc::sched_getaffinity(0, size_of_val(&set), &mut set), 0);
        (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &set)).collect()
    };
    let other = cpus.get(1).copied();
    let mut bench = Bench::new(cpus[0], other);
    for (situation, _) in SITUATIONS {
        let found = bench.sample(&[Contender::Libc, Contender::Libc], situation, 4096, 3, 1000);
        if other.is_none() && situation.is_across_cores() {
            assert!(found.is_err());
            continue;
        }
        let found = found.expect("samples");
        assert!(found.ns.len() == 2 && found.ns.iter().all(|samples| samples.len() == 3));
        assert_eq!(found.conditions.len(), 3);
        assert!(found.ns.iter().flatten().all(|ns| *ns > 0.0));
    }
}
