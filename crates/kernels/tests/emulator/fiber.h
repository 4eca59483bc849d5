#pragma once
// Saves the registers of one fiber and goes on with another. For emu.h and steps.h.
extern "C" void emu_switch(void **save, void *to);
asm(R"(
.text
.local emu_switch
.type emu_switch,@function
emu_switch:
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
)");
