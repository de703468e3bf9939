// The kernels with one fault planted behind their entry point, to prove that a sanitizer run fails when it should.
// LLMCTL_FAULT chooses it: heap (reads past the step's token ids), arena (writes past the last op's rows, inside the
// arena), undefined (signed overflow).
#define llmctl_step llmctl_sound_step
#include "program.cpp"
#undef llmctl_step

#include <cstdlib>
#include <string>

extern "C" int llmctl_step(llmctl_program* program, const llmctl::StepDesc* step, const llmctl::SamplingDesc* sampling) {
  const char* asked = std::getenv("LLMCTL_FAULT");
  const std::string fault = asked ? asked : "";
  volatile int sink = 0;
  if (fault == "heap") sink = step->token_ids[step->tokens];
  if (fault == "arena") {
    const llmctl::Matrix& y = program->plain.ops.back().y;
    y.data[program->max_rows * y.ld] = 1;
  }
  if (fault == "undefined") {
    volatile int large = INT32_MAX;
    sink = large + int(step->tokens);
  }
  (void)sink;
  return llmctl_sound_step(program, step, sampling);
}
