// One OpenMP team a call. libgomp.so.1 is the library that torch loads too, so the process has one pool.
#pragma once

namespace pycompress {

// body(i) for each i in [0, threads), one thread each. `body` must not throw.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) body(i);
}

}  // namespace pycompress
