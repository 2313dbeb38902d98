// attend on Hopper (sm_90a): the contract of attend.h, for the arguments that attend_sm90_supports names.
#pragma once
#include <cstddef>

#include "cuda/attend.h"

namespace longlive {

struct AttendSm90Options {
  int page_slots;    // how many pages the pools have; a slot past them counts as a page of zeros
  int key_tile = 0;  // tokens of a key tile: 112, 128, 144 or 176; 0: chosen by the frame size
};

bool attend_sm90_supports(const AttendArguments& arguments);

// Bytes of workspace that attend_sm90 needs. Of the arguments only the sizes are looked at.
size_t attend_sm90_workspace(const AttendArguments& arguments, const AttendSm90Options& options);

// `workspace`: of that size, aligned to 16 bytes; it need not be initialised and holds nothing of use
// afterwards.
void attend_sm90(const AttendArguments& arguments, const AttendSm90Options& options, void* workspace,
                 void* stream);

}  // namespace longlive
