// Comes before any other header of ops.cpp: the library then loads with older libraries than it was
// compiled beside, as a manylinux_2_28 wheel must.
#pragma once

#include <cstddef>  // which has libstdc++'s settings

#ifdef __GLIBCXX__
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

#include <sstream>
#include <string>

// What its later versions have of strings and streams is compiled in here, for all files.
template class std::basic_string<char>;
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
#endif
