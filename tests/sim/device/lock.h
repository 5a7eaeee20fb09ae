// The lock of the simulator, which everything that torch calls takes first.
//
// Who holds the lock may come to need Python's interpreter lock (copying a tensor that Python knows takes it). So nobody
// may wait for this lock while holding that one: whoever has to wait lets go of the interpreter first.
#pragma once

#include <mutex>

// From Python, whose headers need not be installed.
extern "C" {
int PyGILState_Check(void);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
}

namespace sim {

class Lock {
 public:
  Lock() {
    if (mutex().try_lock()) return;
    void* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex().lock();
    if (python) PyEval_RestoreThread(python);
  }
  ~Lock() { mutex().unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  // Recursive: an operator that is run while the lock is held may free a tensor.
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex& only = *new std::recursive_mutex;
    return only;
  }
};

}  // namespace sim
