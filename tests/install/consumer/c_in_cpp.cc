// quire_c.h from C++, next to the C++ headers and alone.
#include "quire/quire_c.h"

#include <cstdio>

#include "quire/quire.h"

int main() {
  const quire_attention_mask mask = quire_attention_mask_default();
  const bool same = mask.sliding_window == quire::AttentionMask().sliding_window && mask.causal == 1;
  std::printf("%s %s\n", quire_version(), same ? "same defaults" : "other defaults");
  return same && quire_version_number() == quire::version_number() ? 0 : 1;
}
