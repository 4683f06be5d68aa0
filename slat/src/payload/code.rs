//! The payloads' machine code, and the block of parameters it reads.
//!
//! The code is assembled into this program. A guest gets a copy of the bytes,
//! a native run calls the very same bytes where they are: what differs between
//! the two is the machine below them and nothing else. It is position
//! independent and touches only what its parameters point to.

use std::sync::atomic::{AtomicU64, Ordering};

/// Port through which a payload marks its phases.
pub const DOORBELL: u16 = 0xb1;
/// Warm-up is done, measuring begins.
pub const BEGIN: u8 = 1;
/// A round was measured.
pub const END: u8 = 2;
/// The other machine's turn.
pub const SWITCH: u8 = 3;

/// [`Params::flags`]: read the time-stamp counter around each round.
pub const TAKE_TSC: u64 = 1;
/// [`Params::flags`]: ring [`SWITCH`] before each lap.
pub const RING_EACH_LAP: u64 = 2;

/// What a payload is told and what it reports; offsets are written into the code below.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Params {
    /// Address of the operation's code.
    pub op: AtomicU64,
    /// Operations before the first measurement.
    pub warm: AtomicU64,
    /// Operations a round.
    pub count: AtomicU64,
    /// Operations of the call under way.
    pub n: AtomicU64,
    /// Start of the data.
    pub base: AtomicU64,
    /// Pages (touches, links of the chain a lap) in the data.
    pub pages: AtomicU64,
    /// Bytes from one page to the next.
    pub stride: AtomicU64,
    /// Virtual address that page-table payloads map and unmap.
    pub window: AtomicU64,
    /// Where its entry lies.
    pub pte: AtomicU64,
    /// Value of the entry.
    pub value: AtomicU64,
    /// Another value of the entry.
    pub other: AtomicU64,
    /// Where the entry of the window's table lies.
    pub pde: AtomicU64,
    /// Value of that entry.
    pub pde_value: AtomicU64,
    /// Array of CR3 values.
    pub roots: AtomicU64,
    /// How many there are.
    pub root_count: AtomicU64,
    /// Flags, see [`TAKE_TSC`] and [`RING_EACH_LAP`].
    pub flags: AtomicU64,
    /// Where the pointer chase stands.
    pub cursor: AtomicU64,
    /// Time-stamp counter ticks of the last round.
    pub ticks: AtomicU64,
}

impl Params {
    /// Sets a field.
    pub fn set(field: &AtomicU64, value: u64) {
        field.store(value, Ordering::Relaxed);
    }
}

// Registers: rdi holds the parameters and stays; an operation may use the rest
// but for rbx, rbp, rsp and, where it also runs natively, r12 to r15.
// The page-fault handler writes r15 to [r14] and returns: an operation that
// faults on purpose says so in these two before it does.
// The emulator of a kvm_pvm host takes only plain instructions in ring 0, so
// the frame around the operations has no others but behind TAKE_TSC.
core::arch::global_asm!(
    r#"
    .pushsection .text.slat_payload, "ax", @progbits
    .balign 64
    .globl slat_payload_begin, slat_payload_end, slat_frame, slat_page_fault
    .globl slat_cpuid, slat_pte_write, slat_invlpg, slat_churn, slat_demand_fault
    .globl slat_mmap_batch, slat_cr3, slat_touch, slat_chase, slat_laps, slat_spaces
    .globl slat_miss, slat_hang
slat_payload_begin:

slat_frame:
    mov rbx, [rdi + 0]
    mov rax, [rdi + 8]
    test rax, rax
    jz 2f
    mov [rdi + 24], rax
    call rbx
2:  mov al, 1
    out 0xb1, al
    mov rax, [rdi + 16]
    mov [rdi + 24], rax
    test qword ptr [rdi + 120], 1
    jz 3f
    lfence
    rdtsc
    lfence
    shl rdx, 32
    or rax, rdx
    mov [rdi + 136], rax
    call rbx
    lfence
    rdtsc
    lfence
    shl rdx, 32
    or rax, rdx
    sub rax, [rdi + 136]
    mov [rdi + 136], rax
    jmp 4f
3:  call rbx
4:  mov al, 2
    out 0xb1, al
    jmp 2b

    .balign 16
slat_page_fault:
    mov [r14], r15
    add rsp, 8
    iretq

    .balign 16
slat_hang:
2:  jmp 2b

    .balign 16
slat_cpuid:
    push rbx
    mov rsi, [rdi + 24]
2:  xor eax, eax
    cpuid
    dec rsi
    jnz 2b
    pop rbx
    ret

    .balign 16
slat_pte_write:
    mov rsi, [rdi + 24]
    mov r8, [rdi + 64]
    mov r9, [rdi + 72]
    mov r10, [rdi + 80]
    mov r11, [rdi + 56]
2:  mov [r8], r9
    invlpg [r11]
    mov al, [r11]
    mov rdx, r9
    mov r9, r10
    mov r10, rdx
    dec rsi
    jnz 2b
    ret

    .balign 16
slat_invlpg:
    mov rsi, [rdi + 24]
    mov r11, [rdi + 56]
2:  invlpg [r11]
    dec rsi
    jnz 2b
    ret

    // Each page of the window in turn: its entry is flipped between two frames.
    .balign 16
slat_churn:
    mov rsi, [rdi + 24]
    mov r9, [rdi + 72]
    xor r9, [rdi + 80]
2:  mov r8, [rdi + 64]
    mov r11, [rdi + 56]
    mov rcx, [rdi + 40]
3:  xor [r8], r9
    invlpg [r11]
    mov al, [r11]
    add r8, 8
    add r11, 4096
    dec rsi
    jz 4f
    dec rcx
    jnz 3b
    jmp 2b
4:  ret

    .balign 16
slat_demand_fault:
    mov rsi, [rdi + 24]
    mov r14, [rdi + 64]
    mov r15, [rdi + 72]
    mov r11, [rdi + 56]
2:  mov al, [r11]
    mov qword ptr [r14], 0
    invlpg [r11]
    dec rsi
    jnz 2b
    ret

    // A batch: hang in an empty table, fault in its 512 pages one by one, clear
    // the entries, take the table out, flush by reloading CR3. Its value comes from
    // the array of roots: reading CR3 leaves the guest too where tables are shadowed.
    .balign 16
slat_mmap_batch:
    mov rsi, [rdi + 24]
    mov r10, [rdi + 104]
    mov r10, [r10]
2:  mov r8, [rdi + 88]
    mov rax, [rdi + 96]
    mov [r8], rax
    mov r14, [rdi + 64]
    mov r15, [rdi + 72]
    mov r11, [rdi + 56]
    mov ecx, 512
3:  mov al, [r11]
    add r14, 8
    add r15, 4096
    add r11, 4096
    dec ecx
    jnz 3b
    mov r14, [rdi + 64]
    mov ecx, 512
3:  mov qword ptr [r14], 0
    add r14, 8
    dec ecx
    jnz 3b
    mov qword ptr [r8], 0
    mov cr3, r10
    sub rsi, 512
    ja 2b
    ret

    .balign 16
slat_cr3:
    mov rsi, [rdi + 24]
2:  mov r8, [rdi + 104]
    mov rcx, [rdi + 112]
3:  mov rax, [r8]
    mov cr3, rax
    add r8, 8
    dec rsi
    jz 4f
    dec rcx
    jnz 3b
    jmp 2b
4:  ret

    .balign 16
slat_touch:
    mov rsi, [rdi + 24]
    mov r9, [rdi + 48]
2:  mov r11, [rdi + 32]
    mov rcx, [rdi + 40]
3:  mov byte ptr [r11], 1
    add r11, r9
    dec rsi
    jz 4f
    dec rcx
    jnz 3b
    jmp 2b
4:  ret

    .balign 16
slat_chase:
    mov rsi, [rdi + 24]
    mov rax, [rdi + 128]
2:  mov rax, [rax]
    dec rsi
    jnz 2b
    mov [rdi + 128], rax
    ret

    // Laps of a chase over all pages, with a doorbell between laps where asked
    // for; only the chase is timed. Ticks are added up in r10.
    .balign 16
slat_laps:
    mov rsi, [rdi + 24]
    xor r10d, r10d
2:  test qword ptr [rdi + 120], 2
    jz 3f
    mov al, 3
    out 0xb1, al
3:  mov rcx, [rdi + 40]
    mov r8, [rdi + 128]
    lfence
    rdtsc
    lfence
    shl rdx, 32
    or rax, rdx
    mov r9, rax
4:  mov r8, [r8]
    dec rcx
    jnz 4b
    lfence
    rdtsc
    lfence
    shl rdx, 32
    or rax, rdx
    sub rax, r9
    add r10, rax
    mov [rdi + 128], r8
    dec rsi
    jnz 2b
    mov [rdi + 136], r10
    ret

    // Every page of the data through every root.
    .balign 16
slat_spaces:
    mov r8, [rdi + 104]
    mov rsi, [rdi + 112]
    mov r9, [rdi + 48]
2:  mov rax, [r8]
    mov cr3, rax
    mov r11, [rdi + 32]
    mov rcx, [rdi + 40]
3:  mov byte ptr [r11], 1
    add r11, r9
    dec rcx
    jnz 3b
    add r8, 8
    dec rsi
    jnz 2b
    ret

    // A load of a page that no TLB holds, between two marks at which the lab's emulator writes memory references
    // down. To everybody else they are nothing. The first load is for the accessed bits.
    .balign 16
slat_miss:
    mov rsi, [rdi + 24]
    mov r11, [rdi + 32]
2:  mov al, [r11]
    invlpg [r11]
    xchg bx, bx
    mov al, [r11]
    xchg bx, bx
    dec rsi
    jnz 2b
    ret

slat_payload_end:
    .popsection
"#
);

/// The machine code of one operation.
pub type Operation = unsafe extern "C" fn(*const Params);

unsafe extern "C" {
    static slat_payload_begin: u8;
    static slat_payload_end: u8;
    fn slat_frame(params: *const Params);
    fn slat_page_fault(params: *const Params);
    fn slat_hang(params: *const Params);
    fn slat_cpuid(params: *const Params);
    fn slat_pte_write(params: *const Params);
    fn slat_invlpg(params: *const Params);
    fn slat_churn(params: *const Params);
    fn slat_demand_fault(params: *const Params);
    fn slat_mmap_batch(params: *const Params);
    fn slat_cr3(params: *const Params);
    fn slat_touch(params: *const Params);
    fn slat_chase(params: *const Params);
    fn slat_laps(params: *const Params);
    fn slat_spaces(params: *const Params);
    fn slat_miss(params: *const Params);
}

/// A place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// Where a guest starts: warm-up, rounds, doorbells.
    Frame,
    /// The page-fault handler.
    PageFault,
    /// Never comes back: tests the watchdog.
    Hang,
    /// `cpuid`, which leaves the guest on every processor.
    Cpuid,
    /// Write an entry, `invlpg`, touch.
    PteWrite,
    /// `invlpg` alone.
    Invlpg,
    /// Entries of many pages flipped in turn.
    Churn,
    /// Fault, map, unmap.
    DemandFault,
    /// Faults and unmaps of 512 pages at a time.
    MmapBatch,
    /// `mov cr3` over some roots.
    Cr3,
    /// A store a page.
    Touch,
    /// Dependent loads.
    Chase,
    /// Timed laps of dependent loads.
    Laps,
    /// All data through each of many address spaces.
    Spaces,
    /// A load that misses the TLB.
    Miss,
}

impl Label {
    /// The code behind this label in this process.
    pub fn operation(self) -> Operation {
        match self {
            Self::Frame => slat_frame,
            Self::PageFault => slat_page_fault,
            Self::Hang => slat_hang,
            Self::Cpuid => slat_cpuid,
            Self::PteWrite => slat_pte_write,
            Self::Invlpg => slat_invlpg,
            Self::Churn => slat_churn,
            Self::DemandFault => slat_demand_fault,
            Self::MmapBatch => slat_mmap_batch,
            Self::Cr3 => slat_cr3,
            Self::Touch => slat_touch,
            Self::Chase => slat_chase,
            Self::Laps => slat_laps,
            Self::Spaces => slat_spaces,
            Self::Miss => slat_miss,
        }
    }

    /// Bytes from the start of [`bytes`] to this label.
    pub fn offset(self) -> u64 {
        let begin = std::ptr::addr_of!(slat_payload_begin) as usize;
        (self.operation() as usize - begin) as u64
    }
}

/// The whole code, as a guest gets it.
pub fn bytes() -> &'static [u8] {
    let begin = std::ptr::addr_of!(slat_payload_begin);
    let end = std::ptr::addr_of!(slat_payload_end);
    // SAFETY: the two labels stand around one section of this program, which is never written.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn the_code_and_the_parameters_agree() {
        for (offset, in_code) in [
            (offset_of!(Params, op), 0),
            (offset_of!(Params, warm), 8),
            (offset_of!(Params, count), 16),
            (offset_of!(Params, n), 24),
            (offset_of!(Params, base), 32),
            (offset_of!(Params, pages), 40),
            (offset_of!(Params, stride), 48),
            (offset_of!(Params, window), 56),
            (offset_of!(Params, pte), 64),
            (offset_of!(Params, value), 72),
            (offset_of!(Params, other), 80),
            (offset_of!(Params, pde), 88),
            (offset_of!(Params, pde_value), 96),
            (offset_of!(Params, roots), 104),
            (offset_of!(Params, root_count), 112),
            (offset_of!(Params, flags), 120),
            (offset_of!(Params, cursor), 128),
            (offset_of!(Params, ticks), 136),
        ] {
            assert_eq!(offset, in_code);
        }
        assert!(size_of::<Params>() <= 0x100);
    }

    #[test]
    fn the_code_fits_its_page() {
        assert!(bytes().len() < 0x1000, "{} bytes", bytes().len());
        assert!(Label::Miss.offset() < bytes().len() as u64);
        assert_eq!(Label::Frame.offset(), 0);
    }
}
