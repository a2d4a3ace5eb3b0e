// The scope of a ranking or a scaling, by its name in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "headwise/importance.h"

inline headwise::Scope scope_of(const std::string& name) {
  if (name == "layer") return headwise::Scope::layer;
  if (name == "model") return headwise::Scope::model;
  throw pybind11::value_error("scope must be 'model' or 'layer', got '" + name + "'");
}
