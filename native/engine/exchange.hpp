// What it costs workers who share a layer that one reads what another has just written.
#pragma once

namespace znn {

// Bytes of spectra per second that go from one core to another, beyond what they take in the caches of one: of a small tiled layer of
// bundles of so many maps, whose pieces two cores do in turns. Measured in about 20 ms; 0 where the process has only one core.
double exchange_rate(int bundle);

}  // namespace znn
