//! What the kernel has told the program at its start: the auxiliary vector and the environment.

use crate::operations::Setting;
use crate::sys;
use crate::trace::{self, Aside};

const AT_PHDR: usize = 3;
const AT_PHNUM: usize = 5;
const AT_SECURE: usize = 23;
const AT_EXECFN: usize = 31;
const ENVIRONMENT_BYTES_MAX: usize = 4 << 20;
const VARIABLES_MAX: usize = 1 << 16;

/// Of the auxiliary vector; 0 for what it has not.
#[derive(Clone, Copy)]
pub struct Auxiliary {
    pub secure: bool,
    /// The program's headers: their address, and how many.
    pub headers: usize,
    pub header_count: usize,
    /// The name of the program: the last thing on the stack that the kernel has filled.
    name: usize,
}

impl Auxiliary {
    /// `None` if it cannot be read.
    pub fn read() -> Option<Self> {
        let mut words = [0; 128];
        let got = sys::auxiliary_vector(&mut words).or_else(|| {
            let descriptor = i32::try_from(sys::open(b"/proc/self/auxv\0", 0, 0)).ok()?;
            let got = (descriptor >= 0).then(|| sys::read_at(descriptor, &mut words, 0))?;
            sys::close(descriptor);
            usize::try_from(got).ok()
        })?;
        let words = words.get(..got / 8)?;
        let value = |wanted: usize| {
            let pair = words.chunks_exact(2).find(|pair| pair[0] == wanted as u64);
            pair.map_or(0, |pair| pair[1] as usize)
        };
        Some(Self {
            secure: value(AT_SECURE) != 0,
            headers: value(AT_PHDR),
            header_count: value(AT_PHNUM),
            name: value(AT_EXECFN),
        })
    }
}

/// The first three registers at the constructor's call. glibc puts main's arguments there, musl nothing.
#[derive(Clone, Copy)]
pub struct Registers(pub [usize; 3]);

impl Registers {
    /// Where the environment's pointers lie, if these are main's arguments: nothing is read that is not on the stack for sure.
    fn environment(self, auxiliary: &Auxiliary) -> Option<usize> {
        let [count, arguments, environment] = self.0;
        let here = (&raw const self) as usize;
        let end = arguments.checked_add(count.checked_mul(8)?)?;
        let plausible = arguments > here && arguments % 8 == 0 && end.checked_add(8)? == environment;
        (plausible && environment < auxiliary.name).then_some(())?;
        // SAFETY: between this frame and the program's name all is stack.
        (unsafe { (end as *const usize).read() } == 0).then_some(environment)
    }
}

/// Reads our variables.
pub fn variables(registers: Registers, auxiliary: &Auxiliary) -> Result<Variables, Aside> {
    let mut variables = Variables::default();
    let known = registers.environment(auxiliary);
    if known.and_then(|environment| variables.feed_pointers(environment, auxiliary.name)).is_none() {
        variables = Variables::default();
        variables.feed_file()?;
    }
    if variables.trace {
        trace::enable(variables.file.get(..variables.file_length));
    }
    Ok(variables)
}

/// Where containers have their service's socket.
const CHANNEL: &[u8] = b"/run/.polytropo/channel.sock";
const NAME: &[u8] = b"POLYTROPO_";
const VARIABLE_BYTES: usize = 512;

/// Picks our variables out of all, a byte at a time; longer values than fit are none.
pub struct Variables {
    current: [u8; VARIABLE_BYTES],
    length: usize,
    pub trace: bool,
    pub off: bool,
    patient: bool,
    file: [u8; VARIABLE_BYTES],
    file_length: usize,
    channel: [u8; VARIABLE_BYTES],
    channel_length: usize,
    mount: [u8; VARIABLE_BYTES],
    mount_length: usize,
}

impl Default for Variables {
    fn default() -> Self {
        let zeros = [0; VARIABLE_BYTES];
        Self {
            current: zeros,
            length: 0,
            trace: false,
            off: false,
            patient: false,
            file: zeros,
            file_length: 0,
            channel: zeros,
            channel_length: 0,
            mount: zeros,
            mount_length: 0,
        }
    }
}

impl Variables {
    pub fn setting(&self) -> Option<Setting> {
        let channel = &self.channel[..self.channel_length];
        let channel = if channel.is_empty() { CHANNEL } else { channel };
        let mut setting = Setting::new(channel, &self.mount[..self.mount_length])?;
        setting.set_patient(self.patient);
        Some(setting)
    }

    /// From the array of pointers to them, all of which lie before `end`. `None` if something is not as the kernel leaves it.
    fn feed_pointers(&mut self, environment: usize, end: usize) -> Option<()> {
        for index in 0..VARIABLES_MAX {
            let at = environment.checked_add(index * 8).filter(|at| *at + 8 <= end)?;
            // SAFETY: on the stack, as the caller knows of everything from `environment` to `end`.
            let variable = unsafe { (at as *const usize).read() };
            if variable == 0 {
                return Some(());
            }
            let length = end.checked_sub(variable).filter(|_| variable > environment)?;
            // SAFETY: as above.
            let bytes = unsafe { core::slice::from_raw_parts(variable as *const u8, length) };
            if bytes.starts_with(NAME) {
                let value = bytes.iter().position(|byte| *byte == 0)?;
                bytes.get(..=value)?.iter().for_each(|byte| self.feed(*byte));
            }
        }
        None
    }

    /// As /proc tells.
    fn feed_file(&mut self) -> Result<(), Aside> {
        let descriptor = sys::open(b"/proc/self/environ\0", 0, 0);
        if descriptor < 0 {
            return Err(Aside::NoProc);
        }
        let mut buffer = [0; 4096];
        let mut seen_bytes = 0;
        loop {
            let got = sys::read(descriptor as i32, &mut buffer);
            if got <= 0 || seen_bytes > ENVIRONMENT_BYTES_MAX {
                break;
            }
            seen_bytes += got as usize;
            buffer[..got as usize].iter().for_each(|byte| self.feed(*byte));
        }
        sys::close(descriptor as i32);
        self.feed(0);
        Ok(())
    }

    fn feed(&mut self, byte: u8) {
        if byte == 0 {
            self.end();
            self.length = 0;
            return;
        }
        if let Some(place) = self.current.get_mut(self.length) {
            *place = byte;
        }
        // What is not ours is not kept.
        let foreign = NAME.get(self.length).is_some_and(|expected| *expected != byte);
        self.length = if foreign { VARIABLE_BYTES + 1 } else { self.length.saturating_add(1) };
    }

    fn end(&mut self) {
        let Some(variable) = self.current.get(..self.length) else { return };
        let Some(variable) = variable.strip_prefix(NAME) else { return };
        if let Some(value) = variable.strip_prefix(b"TRACE=") {
            self.trace = value == b"1";
        } else if let Some(value) = variable.strip_prefix(b"PRELOAD=") {
            self.off = value == b"off";
            self.patient = value == b"auto";
        } else if let Some(value) = variable.strip_prefix(b"TRACE_FILE=") {
            self.file[..value.len()].copy_from_slice(value);
            self.file_length = value.len();
        } else if let Some(value) = variable.strip_prefix(b"CHANNEL=") {
            self.channel[..value.len()].copy_from_slice(value);
            self.channel_length = value.len();
        } else if let Some(value) = variable.strip_prefix(b"MOUNT=") {
            self.mount[..value.len()].copy_from_slice(value);
            self.mount_length = value.len();
        }
    }
}
