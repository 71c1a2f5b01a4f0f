//! The operations that are timed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, statat};

use crate::measure::{Figure, timed};

type Outcome = io::Result<Vec<Figure>>;

/// A small deterministic generator: the same blocks in every run and on every side.
pub struct Dice(u64);

impl Dice {
    pub fn new(number: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ number)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }
}

fn one(figure: io::Result<Figure>) -> Outcome {
    Ok(vec![figure?])
}

fn visit(directory: &Path, each: &mut dyn FnMut(&Path, fs::FileType) -> io::Result<()>) -> io::Result<u64> {
    let mut pending = vec![directory.to_owned()];
    let mut entries = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            each(&path, kind)?;
            entries += 1;
            if kind.is_dir() {
                pending.push(path);
            }
        }
    }
    Ok(entries)
}

pub fn walk(directory: &Path) -> Outcome {
    one(timed("walk", || {
        visit(directory, &mut |path, _| {
            statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(())
        })
    }))
}

pub fn read_tree(directory: &Path) -> Outcome {
    let mut buffer = vec![0; 1 << 20];
    one(timed("read_tree_bytes", || {
        let mut bytes = 0;
        visit(directory, &mut |path, kind| {
            if kind.is_file() {
                let mut file = File::open(path)?;
                loop {
                    let count = file.read(&mut buffer)?;
                    if count == 0 {
                        break;
                    }
                    bytes += count as u64;
                }
            }
            Ok(())
        })?;
        Ok::<_, io::Error>(bytes)
    }))
}

pub fn read_sequential(path: &Path, block_bytes: usize, rounds: usize) -> Outcome {
    let file = File::open(path)?;
    let mut buffer = vec![0; block_bytes];
    one(timed("read_sequential_bytes", || {
        let mut bytes = 0;
        for _ in 0..rounds {
            let mut offset = 0;
            loop {
                let count = file.read_at(&mut buffer, offset)?;
                if count == 0 {
                    break;
                }
                offset += count as u64;
            }
            bytes += offset;
        }
        Ok::<_, io::Error>(bytes)
    }))
}

pub fn read_random(path: &Path, block_bytes: usize, count: usize) -> Outcome {
    let file = File::open(path)?;
    let blocks = file.metadata()?.len() / block_bytes as u64;
    let mut buffer = vec![0; block_bytes];
    let mut dice = Dice::new(0);
    one(timed("read_random_calls", || {
        for _ in 0..count {
            file.read_exact_at(&mut buffer, dice.below(blocks) * block_bytes as u64)?;
        }
        Ok::<_, io::Error>(count as u64)
    }))
}

pub fn write_sequential(path: &Path, size_bytes: u64, block_bytes: usize) -> Outcome {
    let buffer = vec![0x5a; block_bytes];
    one(timed("write_sequential_bytes", || {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
        let mut offset = 0;
        while offset < size_bytes {
            file.write_all_at(&buffer, offset)?;
            offset += block_bytes as u64;
        }
        file.sync_all()?;
        Ok::<_, io::Error>(offset)
    }))
}

pub fn write_random(path: &Path, block_bytes: usize, count: usize) -> Outcome {
    let file = OpenOptions::new().write(true).open(path)?;
    let blocks = file.metadata()?.len() / block_bytes as u64;
    let buffer = vec![0xa5; block_bytes];
    let mut dice = Dice::new(0);
    one(timed("write_random_calls", || {
        for _ in 0..count {
            file.write_all_at(&buffer, dice.below(blocks) * block_bytes as u64)?;
        }
        file.sync_all()?;
        Ok::<_, io::Error>(count as u64)
    }))
}

pub fn create_stat_unlink(directory: &Path, count: usize) -> Outcome {
    let names: Vec<PathBuf> =
        (0..count).map(|i| directory.join(OsString::from_vec(format!("file-{i:06}").into_bytes()))).collect();
    let data = [0x42; 1024];
    let all = |work: &dyn Fn(&Path) -> io::Result<()>| -> io::Result<u64> {
        names.iter().try_for_each(|name| work(name))?;
        Ok(names.len() as u64)
    };
    Ok(vec![
        timed("create", || {
            all(&|name| OpenOptions::new().write(true).create_new(true).open(name)?.write_all_at(&data, 0))
        })?,
        timed("stat", || {
            all(&|name| {
                statat(CWD, name, AtFlags::SYMLINK_NOFOLLOW)?;
                Ok(())
            })
        })?,
        timed("unlink", || all(&|name| fs::remove_file(name)))?,
    ])
}

pub fn first_write(path: &Path) -> Outcome {
    one(timed("first_write", || {
        let file = OpenOptions::new().write(true).open(path)?;
        let middle = file.metadata()?.len() / 2 / 4096 * 4096;
        file.write_all_at(&[0xc3; 4096], middle)?;
        Ok::<_, io::Error>(1)
    }))
}
