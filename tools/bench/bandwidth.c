/* Reads memory with THREADS threads as fast as it can: for each line on standard input one line with GB/s.
   cc -O3 -march=native -pthread bandwidth.c -o bandwidth && ./bandwidth 2
   After the threads may stand how many BYTES are read again and again, and "processor" for the processor's clock. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BYTES (1UL << 30) /* more than any cache */
#define MOST 64

typedef uint64_t wide __attribute__((vector_size(64)));
struct part { const wide *first; size_t count, times; wide sum; };

static void *read_part(void *given) {
  struct part *part = given;
  wide sums[4] = {0};
  for (size_t time = 0; time < part->times; time++) {
    for (size_t i = 0; i < part->count; i += 4)
      for (int j = 0; j < 4; j++) sums[j] ^= part->first[i + j];
    __asm__ volatile("" ::: "memory"); /* or what is read twice is nothing */
  }
  part->sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return NULL;
}

static clockid_t clock_read = CLOCK_MONOTONIC;

static double seconds(void) {
  struct timespec t;
  clock_gettime(clock_read, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char **argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 1;
  if (threads < 1 || threads > MOST) return 2;
  size_t bytes = argc > 2 ? strtoull(argv[2], NULL, 10) : BYTES;
  if (argc > 3 && !strcmp(argv[3], "processor")) clock_read = CLOCK_PROCESS_CPUTIME_ID;
  size_t count = bytes / sizeof(wide) / threads / 4 * 4, times = bytes < BYTES / 4 ? BYTES / 4 / bytes : 1;
  wide *memory = aligned_alloc(1 << 21, (bytes + (1 << 21) - 1) >> 21 << 21);
  if (!memory || !count) return 1;
  memset(memory, 1, bytes);
  char line[16];
  while (fgets(line, sizeof line, stdin)) {
    double best = 0;
    for (int round = 0; round < 3; round++) {
      pthread_t others[MOST];
      struct part parts[MOST];
      double start = seconds();
      for (int i = 0; i < threads; i++) {
        parts[i] = (struct part){memory + i * count, count, times, {0}};
        if (i) pthread_create(&others[i], NULL, read_part, &parts[i]);
      }
      read_part(&parts[0]);
      for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
      double rate = count * times * threads * sizeof(wide) / (seconds() - start) / 1e9;
      volatile uint64_t used = parts[0].sum[0];
      (void)used;
      if (rate > best) best = rate;
    }
    printf("%.2f\n", best);
    fflush(stdout);
  }
  return 0;
}
