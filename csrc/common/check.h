// Errors of the operators: `atrous_conv2d: weight must be [C_out, C_in, 3, 3], got [8, 4, 5, 5]`, and nothing else.
#pragma once

#include <ranges>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace pyseg {

// Appends one part of a message; a list of sizes becomes [8, 4, 5, 5].
template <typename Part>
void append_part(std::ostringstream& message, const Part& part) {
  if constexpr (std::ranges::range<const Part> && !std::is_convertible_v<const Part&, std::string_view>) {
    const char* separator = "";
    message << '[';
    for (const auto& element : part) {
      message << separator << element;
      separator = ", ";
    }
    message << ']';
  } else {
    message << part;
  }
}

template <typename... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream message;
  (append_part(message, parts), ...);
  throw std::runtime_error(message.str());
}

}  // namespace pyseg

// Throws std::runtime_error, in Python a RuntimeError, made of the parts unless the condition holds. torch's own check
// macros put the path and line of the build machine's file before the message.
#define PYSEG_CHECK(condition, ...)                      \
  do {                                                   \
    if (!(condition)) ::pyseg::throw_error(__VA_ARGS__); \
  } while (false)
