//! The few x86-64 instructions that copies are made of, as bytes (Intel SDM volume 2; prefixes by hand).

/// General registers by their number in encodings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum General {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rsp = 4,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
}

/// A register that bytes pass through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Data {
    General(General),
    /// Number (0-31, above 15 with AVX-512 only) and width: 16, 32 or 64 bytes.
    Vector(u8, u8),
}

/// `[base + displacement]`, or `[base + index + displacement]`.
#[derive(Clone, Copy)]
pub struct Address {
    pub base: General,
    pub index: Option<General>,
    pub displacement: i32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Load,
    StreamingLoad,
    Store,
    NonTemporalStore,
}

#[derive(Clone, Copy)]
pub enum Condition {
    Below = 2,
    AboveOrEqual = 3,
    Equal = 4,
}

/// A jump whose distance is not known yet.
#[must_use]
pub struct Jump(usize);

/// A place to jump back to.
#[derive(Clone, Copy)]
pub struct Label(usize);

/// Writes instructions into a buffer; what does not fit is counted, and [`finish`](Self::finish) then tells nothing.
pub struct Assembler<'a> {
    room: &'a mut [u8],
    length: usize,
}

impl<'a> Assembler<'a> {
    pub fn new(room: &'a mut [u8]) -> Self {
        Self { room, length: 0 }
    }

    pub fn finish(self) -> Option<usize> {
        (self.length <= self.room.len()).then_some(self.length)
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        if let Some(room) = self.room.get_mut(self.length..self.length + bytes.len()) {
            room.copy_from_slice(bytes);
        }
        self.length += bytes.len();
    }

    fn address(&mut self, register: u8, address: Address) {
        let [a, b, c, d] = address.displacement.to_le_bytes();
        let field = (register & 7) << 3;
        match address.index {
            Some(index) => self.bytes(&[0x84 | field, (index as u8) << 3 | address.base as u8, a, b, c, d]),
            // RSP as a base is said by an index of 4.
            None if address.base == General::Rsp => self.bytes(&[0x84 | field, 0x24, a, b, c, d]),
            None => self.bytes(&[0x80 | field | address.base as u8, a, b, c, d]),
        }
    }

    /// Moves bytes between a register and memory. Addresses use the low eight registers only.
    pub fn access(&mut self, data: Data, address: Address, access: Access) {
        match data {
            Data::General(register) => {
                let store = matches!(access, Access::Store | Access::NonTemporalStore);
                let high = u8::from(register as u8 >= 8) << 2;
                match access {
                    Access::NonTemporalStore => self.bytes(&[0x48 | high, 0x0f, 0xc3]),
                    _ => self.bytes(&[0x48 | high, if store { 0x89 } else { 0x8b }]),
                }
                self.address(register as u8, address);
            }
            Data::Vector(number, width) => {
                let (operation, long) = match access {
                    Access::Load => (0x10, false),
                    Access::Store => (0x11, false),
                    Access::NonTemporalStore => (0x2b, false),
                    Access::StreamingLoad => (0x2a, true),
                };
                match width {
                    16 => self.legacy_prefix(number, long),
                    32 => self.vex_prefix(number, long),
                    _ => self.evex_prefix(number, long),
                }
                self.bytes(&[operation]);
                self.address(number, address);
            }
        }
    }

    fn legacy_prefix(&mut self, number: u8, long: bool) {
        if long {
            self.bytes(&[0x66]);
        }
        if number >= 8 {
            self.bytes(&[0x44]);
        }
        self.bytes(if long { &[0x0f, 0x38] } else { &[0x0f] });
    }

    fn vex_prefix(&mut self, number: u8, long: bool) {
        let not_high = u8::from(number < 8) << 7;
        if long {
            self.bytes(&[0xc4, not_high | 0x62, 0x7d]);
        } else {
            self.bytes(&[0xc5, not_high | 0x7c]);
        }
    }

    fn evex_prefix(&mut self, number: u8, long: bool) {
        let not_high = u8::from(number & 8 == 0) << 7;
        let not_highest = u8::from(number & 16 == 0) << 4;
        let map = if long { 2 } else { 1 };
        let prefix = if long { 0x7d } else { 0x7c };
        self.bytes(&[0x62, not_high | 0x60 | not_highest | map, prefix, 0x48]);
    }

    pub fn prefetch(&mut self, operation: u8, hint: u8, base: General, displacement: i32) {
        self.bytes(&[0x0f, operation]);
        self.address(hint, Address { base, index: None, displacement });
    }

    /// `operation`: 0 add, 4 and, 5 sub, 7 cmp.
    pub fn with_constant(&mut self, operation: u8, register: General, constant: i32) {
        self.bytes(&[0x48, 0x81, 0xc0 | operation << 3 | register as u8]);
        self.bytes(&constant.to_le_bytes());
    }

    /// `operation`: 0x01 add, 0x29 sub, 0x39 cmp, 0x89 mov, 0x85 test.
    pub fn with_register(&mut self, operation: u8, to: General, from: General) {
        self.bytes(&[0x48, operation, 0xc0 | (from as u8) << 3 | to as u8]);
    }

    pub fn negate(&mut self, register: General) {
        self.bytes(&[0x48, 0xf7, 0xd8 | register as u8]);
    }

    /// `lea to, [from + displacement]`.
    pub fn address_of(&mut self, to: General, from: General, displacement: i32) {
        self.bytes(&[0x48, 0x8d]);
        self.address(to as u8, Address { base: from, index: None, displacement });
    }

    /// A byte from `[rsi]` to `[rdi]`, through AL.
    pub fn byte(&mut self) {
        self.bytes(&[0x8a, 0x06, 0x88, 0x07]);
    }

    pub fn label(&self) -> Label {
        Label(self.length)
    }

    pub fn jump_back(&mut self, condition: Condition, to: Label) {
        self.bytes(&[0x0f, 0x80 | condition as u8]);
        let from = self.length + 4;
        self.bytes(&(to.0 as i32 - from as i32).to_le_bytes());
    }

    pub fn jump(&mut self, condition: Condition) -> Jump {
        self.bytes(&[0x0f, 0x80 | condition as u8, 0, 0, 0, 0]);
        Jump(self.length)
    }

    /// The jump leads here.
    pub fn land(&mut self, jump: Jump) {
        let distance = self.length as i32 - jump.0 as i32;
        if let Some(room) = self.room.get_mut(jump.0 - 4..jump.0) {
            room.copy_from_slice(&distance.to_le_bytes());
        }
    }
}
