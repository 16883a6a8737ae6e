// Lets the library load with older libraries than it was compiled beside, as a manylinux_2_28 wheel
// must.
#include <cstddef>  // which has libstdc++'s settings

#if defined(__GLIBCXX__)
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

#include <exception>
#include <sstream>
#include <string>

// What its later versions have of strings and streams is compiled in here, for all files.
template class std::basic_string<char>;
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// What <iostream> calls as of GCC 13, so that std::cout is ready, which nothing here writes to.
// Without this one the library would not load with an older C++ library.
extern "C" void ios_base_library_init() asm("_ZSt21ios_base_library_initv");
void ios_base_library_init() {}

// Where GCC 14 lands if an exception leaves a function that is noexcept.
extern "C" [[noreturn]] void __cxa_call_terminate(void*) noexcept { std::terminate(); }
#endif

#if defined(__GLIBC__)
// Whether the process has one thread, as glibc tells the C++ library's reference counts since 2.32.
// Without this one, which says no, the library would not load with an older glibc.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
