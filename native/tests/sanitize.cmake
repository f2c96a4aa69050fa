# -DZNN_SANITIZE=thread or address (which includes undefined behaviour): everything is built with that sanitizer, lightly
# optimised and for few instruction sets.
set(ZNN_SANITIZE "" CACHE STRING "Sanitizer to build with: empty, thread or address")
if(ZNN_SANITIZE STREQUAL "thread")
  set(znn_sanitizers thread)
elseif(ZNN_SANITIZE STREQUAL "address")
  set(znn_sanitizers address,undefined)
elseif(ZNN_SANITIZE)
  message(FATAL_ERROR "ZNN_SANITIZE is ${ZNN_SANITIZE}: expected thread or address")
endif()
if(ZNN_SANITIZE)
  add_compile_options(-fsanitize=${znn_sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${znn_sanitizers})
endif()
