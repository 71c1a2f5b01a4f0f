//! Libraries of this machine, laid out as the loader would.

use polytropo_preload::elf::{Image, Part};

pub struct Loaded {
    pub memory: Vec<u8>,
    pub parts: Vec<(usize, usize, bool)>,
}

fn word(file: &[u8], at: usize) -> usize {
    u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize
}

impl Loaded {
    pub fn open(path: &str) -> Option<Self> {
        let file = std::fs::read(path).ok()?;
        let table = word(&file, 32);
        let count = usize::from(u16::from_le_bytes(file[56..58].try_into().unwrap()));
        let mut loaded = Self { memory: Vec::new(), parts: Vec::new() };
        for header in (0..count).map(|index| table + index * 56).filter(|at| file[*at] == 1) {
            let (offset, address) = (word(&file, header + 8), word(&file, header + 16));
            let (in_file, in_memory) = (word(&file, header + 32), word(&file, header + 40));
            loaded.memory.resize(loaded.memory.len().max(address + in_memory), 0);
            loaded.memory[address..address + in_file].copy_from_slice(&file[offset..offset + in_file]);
            loaded.parts.push((address, address + in_memory, file[header + 4] & 1 == 1));
        }
        Some(loaded)
    }

    pub fn with<T>(&self, run: impl FnOnce(&Image<'_>) -> T) -> T {
        let part = |(from, to, executable): &(usize, usize, bool)| Part {
            address: *from,
            bytes: &self.memory[*from..*to],
            executable: *executable,
        };
        let parts: Vec<_> = self.parts.iter().map(part).collect();
        run(&Image { parts: &parts })
    }
}
