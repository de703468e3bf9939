// Fibres: threads of a block as stacks that one OS thread switches between. A few nanoseconds a switch on x86-64,
// ucontext elsewhere.
#include "runtime.h"

#if defined(__x86_64__)

extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

void fibre_prepare(Fibre& fibre, char* stack, size_t bytes, void (*entry)()) {
    // As if `entry` had been called: at its first instruction the stack pointer is 8 beyond a multiple of 16.
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fibre.context = top;
}

void fibre_switch(Fibre& from, Fibre& to) { emulator_switch(&from.context, to.context); }

}  // namespace emulator

#else
#include <ucontext.h>

namespace emulator {

static ucontext_t* context_of(Fibre& fibre) {
    if (!fibre.context) fibre.context = new ucontext_t{};
    return static_cast<ucontext_t*>(fibre.context);
}

void fibre_prepare(Fibre& fibre, char* stack, size_t bytes, void (*entry)()) {
    ucontext_t* context = context_of(fibre);
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}

void fibre_switch(Fibre& from, Fibre& to) { swapcontext(context_of(from), context_of(to)); }

}  // namespace emulator
#endif
