// The step of a die: walks the tables that step.py writes of its program.  This file is the same for every
// program, so that what a compiler takes for a step does not grow with the layers of a model.  It stands behind
// the definitions of MOST, the pointers that a kernel may take, and CASES, which has one for each number of them.
#include <stdio.h>
#include <tvm/ffi/c_api.h>

extern const int64_t tyir_step_sizes[];  // in bytes: workspace, where the entry's frame begins in it; the
                                         // program's number; tensors among the arguments; sites
extern const int64_t tyir_step_tensors[];    // of each of these: DLPack's code and bits, dimensions, extents
extern const char *const tyir_step_names[];  // what each of them is
extern const int64_t tyir_step_weights[];    // how many there are, and the address of each one's name
extern const int64_t tyir_step_entry[];      // rows

typedef int32_t (*Exchange)(void *context, int32_t site, const void *operand, void *result);

typedef struct {
  const int64_t *weights;
  Exchange exchange;
  void *context;
} Caller;

enum { END, KERNEL, CALL, MEET, WANTED };  // what a row does
enum { GIVEN, LOCAL, WEIGHT, NOTHING };  // what a reference is: the low bits of `number * 4 + kind`

typedef struct {
  int64_t what;
  int64_t target;    // a kernel, the rows of a function, the number of a site, or of numbers in what is given
  int64_t count;     // of references
  int64_t pointers;  // of a call: where in the caller's frame its pointers lie, and where its own frame begins
  int64_t frame;
  int64_t references[];
} Row;

// What a function was given, an offset in its frame, or a weight.
static void *pointer(int64_t reference, void *const *given, char *frame, const Caller *caller) {
  int64_t number = reference >> 2;
  switch (reference & 3) {
    case GIVEN: return given[number];
    case LOCAL: return frame + number;
    case WEIGHT: return (void *)(intptr_t)caller->weights[number];
    default: return NULL;
  }
}

// Whether one of some numbers is not negative.
static int any(const int32_t *numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] >= 0) return 1;
  }
  return 0;
}

static int32_t call(intptr_t kernel, int64_t count, void *const *p) {
  switch (count) {
    CASES
    default: return -1;
  }
}

// 0, or -1 where a kernel did not run.
static int walk(const int64_t *rows, void *const *given, char *frame, const Caller *caller) {
  for (;;) {
    const Row *row = (const Row *)rows;
    if (row->what == END) return 0;
    void *few[MOST], **pointers = row->what == CALL ? (void **)(frame + row->pointers) : few;
    for (int64_t i = 0; i < row->count; ++i) {
      pointers[i] = pointer(row->references[i], given, frame, caller);
    }
    if (row->what == KERNEL) {
      if (call((intptr_t)row->target, row->count, pointers) != 0) return -1;
    } else if (row->what == CALL) {
      const int64_t *callee = (const int64_t *)(intptr_t)row->target;
      if (walk(callee, pointers, frame + row->frame, caller) != 0) return -1;
    } else if (row->what == WANTED) {  // what follows is the optional tail
      if (!any(pointers[0], row->target)) return 0;
    } else {  // a die that has nothing to go on with goes on: others wait to meet it, and its caller knows
      caller->exchange(caller->context, (int32_t)row->target, pointers[0], pointers[1]);
    }
    rows = row->references + row->count;
  }
}

// ------------------------------------------------------------------------------------------------- arguments

static const DLTensor *tensor(const TVMFFIAny *value) {
  switch (value->type_index) {
    case kTVMFFITensor: return (const DLTensor *)((const char *)value->v_obj + sizeof(TVMFFIObject));
    case kTVMFFIDLTensorPtr:
    case kTVMFFIOpaquePtr: return (const DLTensor *)value->v_ptr;
    default: return NULL;
  }
}

static void *start(const DLTensor *given) { return (char *)given->data + given->byte_offset; }

// Whether a tensor is what is wanted, contiguous and in memory of the CPU.
static int fits(const DLTensor *given, const int64_t *wanted) {
  int64_t code = wanted[0], bits = wanted[1], rank = wanted[2], stride = 1;
  if (given == NULL || given->device.device_type != kDLCPU || given->ndim != rank) return 0;
  if (given->dtype.code != code || given->dtype.bits != bits || given->dtype.lanes != 1) return 0;
  for (int64_t i = rank - 1; i >= 0; --i) {
    int64_t extent = given->shape[i];
    if (extent != wanted[3 + i]) return 0;
    if (given->strides != NULL && extent != 1 && given->strides[i] != stride) return 0;
    stride *= extent;
  }
  return given->data != NULL || stride == 0;
}

static int raised(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

// ------------------------------------------------------------------------------------------ what is exported

TVM_FFI_DLL_EXPORT int __tvm_ffi_step(void *self, const TVMFFIAny *arguments, int32_t count,
                                      TVMFFIAny *result) {
  int32_t tensors = (int32_t)tyir_step_sizes[3];  // the last two: the weights' addresses, the workspace
  char message[512];
  if (count != tensors + 2) {
    snprintf(message, sizeof message, "step takes %d arguments, %d are given", tensors + 2, count);
    return raised("TypeError", message);
  }
  const int64_t *wanted = tyir_step_tensors;
  for (int32_t i = 0; i < tensors; ++i, wanted += 3 + wanted[2]) {
    if (fits(tensor(&arguments[i]), wanted)) continue;
    const char *form = "argument #%d of step is not %s, contiguous and in memory of the CPU";
    snprintf(message, sizeof message, form, i, tyir_step_names[i]);
    return raised("ValueError", message);
  }
  for (int32_t i = tensors; i < count; ++i) {
    int32_t type = arguments[i].type_index;
    if (type != kTVMFFIOpaquePtr && type != kTVMFFINone) {
      return raised("TypeError", "the last two arguments of step, exchange and context, are pointers");
    }
  }
  if (tyir_step_sizes[4] != 0 && arguments[tensors].v_ptr == NULL) {
    return raised("ValueError", "the program of this step meets those of other dies: exchange cannot be null");
  }
  const int64_t *weights = (const int64_t *)start(tensor(&arguments[tensors - 2]));
  char *workspace = (char *)start(tensor(&arguments[tensors - 1]));
  void **pointers = (void **)workspace;
  for (int32_t i = 0; i < tensors - 2; ++i) pointers[i] = start(tensor(&arguments[i]));
  Caller caller = {weights, (Exchange)arguments[tensors].v_ptr, arguments[tensors + 1].v_ptr};
  if (walk(tyir_step_entry, pointers, workspace + tyir_step_sizes[1], &caller) == 0) return 0;
  return raised("RuntimeError", "a kernel of the step did not run: its threads could not be started");
}

static int number(TVMFFIAny *result, int64_t value) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = value;
  return 0;
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_step_workspace_bytes(void *self, const TVMFFIAny *arguments, int32_t count,
                                                      TVMFFIAny *result) {
  return number(result, tyir_step_sizes[0]);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_step_program(void *self, const TVMFFIAny *arguments, int32_t count,
                                              TVMFFIAny *result) {
  return number(result, tyir_step_sizes[2]);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_step_weights(void *self, const TVMFFIAny *arguments, int32_t count,
                                              TVMFFIAny *result) {
  result->type_index = kTVMFFIOpaquePtr;
  result->zero_padding = 0;
  result->v_ptr = (void *)tyir_step_weights;
  return 0;
}
