// Greedy decoding without Python:   generate OUT/4die COUNT ID ID ..      prints COUNT tokens after those ids
#include <chrono>
#include <cstdio>
#include <iostream>

#include "tyir.hpp"

static int32_t number(const char* word) {
  size_t read = 0;
  int32_t value = 0;
  try {
    value = std::stoi(word, &read);
  } catch (const std::logic_error&) {
  }
  if (read == 0 || word[read] != 0) tyir::fail(std::string("'") + word + "' is no number of a token or of tokens");
  return value;
}

int main(int count, char** words) {
  if (count < 4) {
    std::cerr << "usage: generate OUT/1die COUNT ID ..\n";
    return 1;
  }
  try {
    std::vector<int32_t> ids;
    for (int i = 3; i < count; ++i) ids.push_back(number(words[i]));
    tyir::Model model(words[1]);
    int wanted = number(words[2]);
    auto start = std::chrono::steady_clock::now();
    model.feed(ids);
    for (int made = 1; made < wanted; ++made) {
      std::cout << model.best() << " " << std::flush;
      model.feed({model.best()});
    }
    std::cout << model.best() << std::endl;
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "%zu tokens of the prompt and %d new ones in %.3f s\n", ids.size(), wanted, seconds.count());
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
