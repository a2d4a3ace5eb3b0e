// TORCH_CHECK_VALUE, TORCH_CHECK_TYPE and TORCH_CHECK_INDEX become ValueError, TypeError and
// IndexError in functions bound by pybind11, as they do in operators, and without a backtrace.
#pragma once

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <exception>

inline void translate_errors() {
  pybind11::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const c10::IndexError& error) {
      pybind11::set_error(PyExc_IndexError, error.what_without_backtrace());
    } catch (const c10::ValueError& error) {
      pybind11::set_error(PyExc_ValueError, error.what_without_backtrace());
    } catch (const c10::TypeError& error) {
      pybind11::set_error(PyExc_TypeError, error.what_without_backtrace());
    } catch (const c10::NotImplementedError& error) {
      pybind11::set_error(PyExc_NotImplementedError, error.what_without_backtrace());
    } catch (const c10::Error& error) {
      pybind11::set_error(PyExc_RuntimeError, error.what_without_backtrace());
    }
  });
}
