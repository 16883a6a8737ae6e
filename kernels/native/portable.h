// Comes before any other header: the library then loads with older libraries than it was compiled
// beside, as a manylinux_2_28 wheel must.
#pragma once

#include <cstddef>  // which has libstdc++'s settings

#ifdef __GLIBCXX__
// What its later versions have of streams is compiled in, where it is used.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#endif
