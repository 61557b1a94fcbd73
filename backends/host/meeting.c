// Dies of one process run and meet in compiled code (`meeting.py` says what this exports).  This file is the same
// for every program; the tables of where a program meets others, which `meeting.py` writes, are data of its library.
//
// Each die's step runs on a stack of its own: where a die must wait for others, the next one of the same thread goes
// on.  Only a worker none of whose dies can go on looks some times and then sleeps (futex(2)).  What threads share is
// atomic and sequentially consistent: a worker that is about to sleep has counted itself before the system compares the
// number of events, and whoever wakes has counted that up before looking at who sleeps.
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <ucontext.h>
#include <unistd.h>

enum { SUM, JOIN, SEND, RECEIVE };  // what a site is
enum { NEW, BEGUN, ENDED };         // how far a die's step has come
enum { LINE = 64, STACK = 1 << 20, GUARD = 1 << 16 };  // bytes; kernels keep less than 1 KiB of numbers each there

// What a collective makes of its members' operands, null of one that gives nothing.
typedef int32_t (*Combine)(const void **operands, void **results, int32_t members);

typedef struct {
  int64_t kind;
  int64_t bytes;  // of what is sent or received
  int64_t tag;    // of a send or a receive
  int64_t count;  // of dies
  const int64_t *dies;  // members in their order, none for all; targets; the source
  union {
    Combine sum;
    const int64_t *join;  // rows, then bytes of a row of each member
  };
} Site;

typedef struct {
  int64_t count;
  Site all[];
} Sites;

extern const Sites tyir_sites;

typedef struct Place Place;  // where the members of a collective meet, or what one die sends another
struct Place {
  _Atomic int32_t word;  // turn of a collective, or whether what was sent is still there
  _Atomic int32_t arrived;
  int64_t sent, tag, count;  // what it is known by: bytes that are sent, 0 of a collective
  int64_t *dies;             // and members, or source and target
  const void **operands;     // of a collective
  void **results;
  char *data;  // of what is sent
  Place *next;
};

typedef struct {  // a die's own of a site
  Place **places;  // one, or each target's
  int64_t me;      // among the members
} Way;

typedef struct Group Group;
typedef struct Worker Worker;

typedef struct {
  Worker *worker;
  const Sites *sites;
  Way *ways;  // of each site
  char *stack;
  ucontext_t own;
  int32_t state, code;
  _Atomic int32_t *word;  // that it waits for: not to be `old` any more
  int32_t old;
  TVMFFIObjectHandle step;
  TVMFFIAny *arguments;
  int32_t count;  // of arguments
} Die;

struct Worker {
  Group *group;
  Die *current;
  ucontext_t main;
  Die *dies;
  int64_t count;
};

struct Group {
  _Alignas(LINE) _Atomic int32_t given_up;  // nobody waits any more
  _Atomic int32_t sleepers;
  _Atomic int32_t events;
  int64_t looks;  // of a worker that has nothing to do, before it sleeps
  int64_t count, worker_count;
  Die *dies;
  Worker *workers;
  Place *places;
};

// --------------------------------------------------------------------------------------------------- waiting

static int raised(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

static void futex(_Atomic int32_t *word, int operation, int32_t value, const struct timespec *time) {
  syscall(SYS_futex, word, operation, value, time, NULL, 0);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns when *word is not `old`, or the group has given up; until then other dies of the worker go on.
static void wait_for(Worker *worker, _Atomic int32_t *word, int32_t old) {
  Die *die = worker->current;
  while (atomic_load(word) == old && !atomic_load(&worker->group->given_up)) {
    die->word = word, die->old = old;
    swapcontext(&die->own, &worker->main);
  }
}

// Sets *word and wakes the workers that sleep.
static void set(Group *group, _Atomic int32_t *word, int32_t value) {
  atomic_store(word, value);
  atomic_fetch_add(&group->events, 1);
  if (atomic_load(&group->sleepers)) futex(&group->events, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
}

static void give_up(Group *group) { set(group, &group->given_up, 1); }

// ------------------------------------------------------------------------------------- what the steps call

// Each member's rows behind those of the ones before it, in all results.
static void join(const int64_t *table, const void **operands, void **results, int64_t members) {
  int64_t rows = table[0], whole = 0, before = 0;
  const int64_t *bytes = table + 1;
  for (int64_t i = 0; i < members; ++i) whole += bytes[i];
  for (int64_t i = 0; i < members; before += bytes[i++]) {
    if (operands[i] == NULL) continue;
    for (int64_t j = 0; j < members; ++j) {
      if (j > 0 && results[j] == results[0]) continue;  // dies may be given the same memory
      for (int64_t row = 0; row < rows; ++row) {
        const char *source = (const char *)operands[i] + row * bytes[i];
        memcpy((char *)results[j] + row * whole + before, source, (size_t)bytes[i]);
      }
    }
  }
}

// The last die that comes makes the results of all.  It leaves the place as it was, so that nothing is to be set up
// between steps.
static int32_t meet(Worker *worker, const Site *site, const Way *way, const void *operand, void *result) {
  Group *group = worker->group;
  Place *place = way->places[0];
  int32_t code = 0, turn = atomic_load(&place->word);
  if (atomic_load(&group->given_up)) return 0;
  place->operands[way->me] = operand, place->results[way->me] = result;
  if (atomic_fetch_add(&place->arrived, 1) + 1 < place->count) {
    wait_for(worker, &place->word, turn);
    return 0;
  }
  atomic_store(&place->arrived, 0);
  if (site->kind == JOIN) {
    join(site->join, place->operands, place->results, place->count);
  } else {
    code = site->sum(place->operands, place->results, (int32_t)place->count);
  }
  if (code != 0) {
    worker->current->code = raised("RuntimeError", "a sum of dies did not run: its threads could not be started");
    give_up(group);
  }
  set(group, &place->word, turn + 1);
  return code;
}

// int32_t exchange(void *context, int32_t site, const void *operand, void *result) of step.c; `context` is the die.
static int32_t exchange(void *context, int32_t number, const void *operand, void *result) {
  Die *die = context;
  Worker *worker = die->worker;
  const Site *site = &die->sites->all[number];
  const Way *way = &die->ways[number];
  if (site->kind == SEND) {  // does not wait, unless what was sent before is still there
    for (int64_t i = 0; i < site->count; ++i) {
      Place *place = way->places[i];
      wait_for(worker, &place->word, 1);
      memcpy(place->data, operand, (size_t)site->bytes);
      set(worker->group, &place->word, 1);
    }
    return 0;
  }
  if (site->kind == RECEIVE) {
    Place *place = way->places[0];
    wait_for(worker, &place->word, 0);
    memcpy(result, place->data, (size_t)site->bytes);
    set(worker->group, &place->word, 0);
    return 0;
  }
  return meet(worker, site, way, operand, result);
}

// --------------------------------------------------------------------------------------------------- running

// A die's step, on its own stack; makecontext(3) passes integers.
static void whole_step(unsigned high, unsigned low) {
  Die *die = (Die *)(((uintptr_t)high << 32) | low);
  TVMFFIAny nothing = {0};
  int32_t code = TVMFFIFunctionCall(die->step, die->arguments, die->count, &nothing);
  if (code != 0) die->code = code;
  die->state = ENDED;
}

static int can_go_on(Group *group, const Die *die) {
  return die->state == NEW || atomic_load(die->word) != die->old || atomic_load(&group->given_up);
}

static void go_on(Worker *worker, Die *die) {
  if (die->state == NEW) {
    die->state = BEGUN;
    getcontext(&die->own);
    die->own.uc_stack.ss_sp = die->stack + GUARD;
    die->own.uc_stack.ss_size = STACK;
    die->own.uc_link = &worker->main;
    uintptr_t address = (uintptr_t)die;
    makecontext(&die->own, (void (*)(void))whole_step, 2, (unsigned)(address >> 32), (unsigned)address);
  }
  worker->current = die;
  swapcontext(&worker->main, &die->own);
  if (die->code != 0) give_up(worker->group);
}

// The steps of a worker's dies, from beginning to end; 0, or -1 where one of them has failed.
static int run(Worker *worker) {
  Group *group = worker->group;
  const struct timespec most = {0, 50000000};
  int64_t looks = 0, left = worker->count;
  if (atomic_load(&group->given_up)) return raised("RuntimeError", "the meeting of these dies was given up");
  for (int64_t i = 0; i < worker->count; ++i) worker->dies[i].state = NEW, worker->dies[i].code = 0;
  while (left > 0) {
    int32_t events = atomic_load(&group->events);
    int moved = 0;
    for (int64_t i = 0; i < worker->count; ++i) {
      Die *die = &worker->dies[i];
      if (die->state == ENDED || !can_go_on(group, die)) continue;
      go_on(worker, die);
      left -= die->state == ENDED;
      moved = 1;
    }
    if (moved) {
      looks = 0;
    } else if (looks < group->looks) {
      pause_briefly();
      ++looks;
    } else if (left > 0) {
      atomic_fetch_add(&group->sleepers, 1);
      futex(&group->events, FUTEX_WAIT_PRIVATE, events, &most);
      atomic_fetch_sub(&group->sleepers, 1);
    }
  }
  int failed = 0;
  for (int64_t i = 0; i < worker->count; ++i) failed |= worker->dies[i].code != 0;
  return failed ? -1 : 0;
}

// ---------------------------------------------------------------------------------------------------- memory

// Nothing but zeros; two of these share no line of the caches.
static void *zeros(int64_t count, size_t bytes) {
  size_t whole = ((size_t)count * bytes / LINE + 1) * LINE;
  void *memory = aligned_alloc(LINE, whole);
  return memory == NULL ? NULL : memset(memory, 0, whole);
}

static void end(Group *group) {
  for (Place *place = group->places, *next; place != NULL; place = next) {
    next = place->next;
    free(place->dies), free(place->operands), free(place->results), free(place->data), free(place);
  }
  for (int64_t i = 0; group->dies != NULL && i < group->count; ++i) {
    Die *die = &group->dies[i];
    for (int64_t s = 0; die->ways != NULL && s < die->sites->count; ++s) free(die->ways[s].places);
    free(die->ways);
    if (die->stack != NULL) munmap(die->stack, GUARD + STACK);
  }
  free(group->dies), free(group->workers), free(group);
}

// The place that is known by these, made where there is none yet.
static Place *place_of(Group *group, int64_t sent, int64_t tag, int64_t count, const int64_t *dies) {
  size_t bytes = (size_t)count * sizeof *dies;
  for (Place *p = group->places; p != NULL; p = p->next) {
    if (p->sent == sent && p->tag == tag && p->count == count && memcmp(p->dies, dies, bytes) == 0) return p;
  }
  Place *place = zeros(1, sizeof *place);
  if (place == NULL) return NULL;
  place->next = group->places, group->places = place;
  place->sent = sent, place->tag = tag, place->count = count;
  place->dies = zeros(count, sizeof *dies);
  place->operands = zeros(count, sizeof *place->operands);
  place->results = zeros(count, sizeof *place->results);
  place->data = zeros(sent, 1);
  if (!place->dies || !place->operands || !place->results || !place->data) return NULL;
  memcpy(place->dies, dies, bytes);
  return place;
}

// Where a die comes to at one of its sites.  False where there is no memory, or it is none of the members.
static int find_places(Group *group, int64_t die, const Site *site, const int64_t *all, Way *way) {
  int mail = site->kind == SEND || site->kind == RECEIVE;
  way->places = zeros(mail ? site->count : 1, sizeof *way->places);
  if (way->places == NULL) return 0;
  for (int64_t i = 0; mail && i < site->count; ++i) {
    int64_t ends[] = {die, site->dies[i]}, turned[] = {site->dies[i], die};
    way->places[i] = place_of(group, site->bytes, site->tag, 2, site->kind == SEND ? ends : turned);
    if (way->places[i] == NULL) return 0;
  }
  if (mail) return 1;
  const int64_t *members = site->count ? site->dies : all;
  int64_t count = site->count ? site->count : group->count;
  while (way->me < count && members[way->me] != die) ++way->me;
  if (way->me == count) return 0;
  return (way->places[0] = place_of(group, 0, 0, count, members)) != NULL;
}

static int make(Group *group, int64_t number, Worker *worker, const Sites *sites, const int64_t *all) {
  Die *die = &group->dies[number];
  die->worker = worker, die->sites = sites;
  int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE;
  void *stack = mmap(NULL, GUARD + STACK, PROT_READ | PROT_WRITE, kind, -1, 0);
  if (stack == MAP_FAILED) return 0;
  die->stack = stack;
  if (mprotect(stack, GUARD, PROT_NONE) != 0) return 0;  // whoever runs out of stack meets this and no other's
  die->ways = zeros(sites->count, sizeof *die->ways);
  for (int64_t s = 0; die->ways != NULL && s < sites->count; ++s) {
    if (!find_places(group, number, &sites->all[s], all, &die->ways[s])) return 0;
  }
  return die->ways != NULL;
}

// Neighbouring dies share a worker, all workers have as many; NULL where there is no memory for it.
static Group *begin(int64_t workers, int64_t looks, int64_t count, const Sites *const *sites) {
  Group *group = zeros(1, sizeof *group);
  int64_t *all = zeros(count, sizeof *all);
  int made = group != NULL && all != NULL;
  if (made) {
    group->looks = looks, group->count = count, group->worker_count = workers;
    group->dies = zeros(count, sizeof *group->dies);
    group->workers = zeros(workers, sizeof *group->workers);
    made = group->dies != NULL && group->workers != NULL;
    for (int64_t i = 0; i < count; ++i) all[i] = i;
  }
  for (int64_t i = 0; made && i < workers; ++i) {
    int64_t each = count / workers;
    group->workers[i] = (Worker){.group = group, .dies = &group->dies[i * each], .count = each};
    for (int64_t d = i * each; made && d < (i + 1) * each; ++d) {
      made = make(group, d, &group->workers[i], sites[d], all);
    }
  }
  free(all);
  if (!made && group != NULL) end(group);
  return made ? group : NULL;
}

// ------------------------------------------------------------------------------------------ what is exported

#define EXPORTED(name) \
  TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result)

// Whether all that is given is of these types: p for a pointer, i for an integer, f for a function; the last of
// them may come again.
static int are(const TVMFFIAny *given, int32_t count, const char *types) {
  int32_t known = (int32_t)strlen(types);
  for (int32_t i = 0; i < count; ++i) {
    char type = types[i < known ? i : known - 1];
    int32_t index = given[i].type_index;
    if (index != (type == 'p' ? kTVMFFIOpaquePtr : type == 'i' ? kTVMFFIInt : kTVMFFIFunction)) return 0;
  }
  return count >= known;
}

static int pointer(TVMFFIAny *result, void *value) {
  *result = (TVMFFIAny){.type_index = kTVMFFIOpaquePtr};
  result->v_ptr = value;
  return 0;
}

EXPORTED(meeting_sites) { return pointer(result, (void *)&tyir_sites); }

EXPORTED(meeting_exchange) { return pointer(result, (void *)exchange); }

EXPORTED(meeting) {
  int64_t dies = count - 2, workers = count ? given[0].v_int64 : 0;
  if (!are(given, count, "iip") || workers < 1 || dies % workers) {
    return raised("TypeError", "meeting takes a number of workers that divides the dies, looks, and each die's sites");
  }
  const Sites **sites = zeros(dies, sizeof *sites);
  for (int64_t i = 0; sites != NULL && i < dies; ++i) sites[i] = given[2 + i].v_ptr;
  Group *group = sites == NULL ? NULL : begin(workers, given[1].v_int64, dies, sites);
  free(sites);
  if (group == NULL) return raised("MemoryError", "there is no memory for the meetings of dies");
  return pointer(result, group);
}

// The die of a group and a number, NULL where it has none.
static Die *die_of(const TVMFFIAny *given, int32_t count, const char *types) {
  if (are(given, count, types)) {
    Group *group = given[0].v_ptr;
    if (given[1].v_int64 >= 0 && given[1].v_int64 < group->count) return &group->dies[given[1].v_int64];
  }
  raised("TypeError", "a function of meetings takes a meeting and a die");
  return NULL;
}

EXPORTED(meeting_context) {
  Die *die = die_of(given, count, "pi");
  return die == NULL ? -1 : pointer(result, die);
}

EXPORTED(meeting_step) {
  Die *die = die_of(given, count, "pifpi");
  if (die == NULL) return -1;
  die->step = given[2].v_obj, die->arguments = given[3].v_ptr, die->count = (int32_t)given[4].v_int64;
  return 0;
}

EXPORTED(meeting_run) {
  Group *group = are(given, count, "pi") ? given[0].v_ptr : NULL;
  if (group == NULL || given[1].v_int64 < 0 || given[1].v_int64 >= group->worker_count) {
    return raised("TypeError", "meeting_run takes a meeting and a worker");
  }
  return run(&group->workers[given[1].v_int64]);
}

EXPORTED(meeting_failed) {
  if (!are(given, count, "p")) return raised("TypeError", "meeting_failed takes a meeting");
  Group *group = given[0].v_ptr;
  int64_t die = 0;
  while (die < group->count && group->dies[die].code == 0) ++die;
  *result = (TVMFFIAny){.type_index = kTVMFFIInt};
  result->v_int64 = die < group->count ? die : -1;
  return 0;
}

EXPORTED(meeting_give_up) {
  if (!are(given, count, "p")) return raised("TypeError", "meeting_give_up takes a meeting");
  give_up(given[0].v_ptr);
  return 0;
}

EXPORTED(meeting_end) {
  if (!are(given, count, "p")) return raised("TypeError", "meeting_end takes a meeting");
  end(given[0].v_ptr);
  return 0;
}
