// attend on Hopper (sm_90a): the contract of attend.h, for the arguments that attend_sm90_supports names.
#pragma once
#include <cstddef>

#include "cuda/attend.h"

namespace longlive {

bool attend_sm90_supports(const AttendArguments& arguments);

// Bytes of workspace that attend_sm90 needs. Of the arguments only the sizes are looked at; `key_tile` is
// that of AttendOptions.
size_t attend_sm90_workspace(const AttendArguments& arguments, int key_tile);

// `workspace`: of that size, aligned to 16 bytes; it need not be initialised and holds nothing of use
// afterwards. A slot past the pools' pages counts as a page of zeros.
void attend_sm90(const AttendArguments& arguments, int key_tile, void* workspace, void* stream);

}  // namespace longlive
