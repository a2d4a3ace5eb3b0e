// Untrusted text in messages.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace headwise {

/// `text` for a message: one quoted line of printable ASCII, about `longest` characters at most.
/// Everything else is escaped as in JSON, what is not UTF-8 as U+FFFD.
inline std::string shown(std::string_view text, size_t longest = 100, char quote = '"') {
  std::string line(1, quote);
  size_t at = 0;
  while (at < text.size() && line.size() < longest) {
    const auto byte = [&](size_t i) {
      return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
    };
    const uint32_t first = byte(at);
    const size_t more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : first >= 0xC0 ? 1 : 0;
    uint32_t code = first < 0x80 ? first : first & (0x3Fu >> more);
    bool valid = first < 0x80 || more > 0;
    for (size_t i = 1; i <= more; ++i) {
      valid &= (byte(at + i) & 0xC0) == 0x80;
      code = code << 6 | (byte(at + i) & 0x3F);
    }
    at += valid ? more + 1 : 1;
    char escaped[16];
    if (!valid) {
      line += "\\ufffd";
    } else if (code == static_cast<unsigned char>(quote) || code == '\\') {
      line += {'\\', static_cast<char>(code)};
    } else if (code >= ' ' && code < 0x7F) {
      line += static_cast<char>(code);
    } else if (code == '\n') {
      line += "\\n";
    } else {
      std::snprintf(escaped, sizeof escaped, code > 0xFFFF ? "\\U%08x" : "\\u%04x", code);
      line += escaped;
    }
  }
  return line + (at < text.size() ? "..." : "") + quote;
}

/// The path of a file, shown at greater length.
inline std::string shown_path(const std::string& path) { return shown(path, 300, '\''); }

/// A layer in a message; "" is the name of a model that is itself a layer.
inline std::string layer_called(std::string_view name) {
  return name.empty() ? "the layer" : "layer " + shown(name, 100, '\'');
}

}  // namespace headwise
