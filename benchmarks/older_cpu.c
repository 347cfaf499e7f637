// Loaded into a process (LD_PRELOAD), hides what x86-64 processors learned after AVX2 from everything in it that asks:
// AVX-512, AVX-VNNI, AMX and AVX10. Linux lets a process forbid itself the CPUID instruction (arch_prctl(2),
// ARCH_SET_CPUID); each use then faults, and the handler below answers it. Threads and forked processes inherit that.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))
#define BITS(low, high) ((BIT((high) - (low)) | (BIT((high) - (low)) - 1)) << (low))

static long allow_cpuid(unsigned long allowed) {
    return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed);
}

// Bit numbers: Intel SDM volume 2A, CPUID.
static void hide(uint32_t leaf, uint32_t subleaf, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
    if (leaf == 7 && subleaf == 0) {
        *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) |
                BIT(31));                                        // F DQ IFMA PF ER CD BW VL
        *c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));  // VBMI VBMI2 VNNI BITALG VPOPCNTDQ
        *d &= ~(BIT(2) | BIT(3) | BIT(8) | BITS(22, 25));        // 4VNNIW 4FMAPS VP2INTERSECT, AMX and FP16
    } else if (leaf == 7 && subleaf == 1) {
        *a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));  // AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA
        *d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) |
                BIT(19));  // AVX-VNNI-INT8 and -INT16, NE-CONVERT, AMX-COMPLEX, AVX10
    } else if (leaf == 0xd && subleaf == 0) {
        *a &= ~(BITS(5, 7) | BIT(17) | BIT(18));  // their state components
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        *a = *b = *c = *d = 0;  // tiles, AVX10
    }
}

static void answer(int number, siginfo_t* info, void* context) {
    (void)info;
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* code = (const uint8_t*)registers[REG_RIP];
    // A fault of CPUID has no address; reading the code of any other is possible too, since it was fetched.
    if (code[0] != 0x0f || code[1] != 0xa2) {
        signal(number, SIG_DFL);  // the instruction runs again and ends the process as it would have
        return;
    }
    const uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
    uint32_t a, b, c, d;
    allow_cpuid(1);
    __cpuid_count(leaf, subleaf, a, b, c, d);
    allow_cpuid(0);
    hide(leaf, subleaf, &a, &b, &c, &d);
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor(101))) static void begin(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGSEGV, &action, NULL) != 0 || allow_cpuid(0) != 0) {
        fprintf(stderr, "older_cpu: this processor or kernel cannot forbid CPUID (no cpuid_fault in /proc/cpuinfo)\n");
        _exit(2);
    }
}
