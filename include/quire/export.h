// QUIRE_API marks what a shared libquire lets programs link: the functions of these headers that are not inline, and
// the classes that have such functions. Everything else stays inside it (docs/build.md).
#pragma once

#if defined(__GNUC__)
#define QUIRE_API __attribute__((visibility("default")))
#else
#define QUIRE_API
#endif
