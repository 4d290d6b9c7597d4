#include "host_operators.hpp"

namespace interstate::tools::replay {

Status run_on_cpu(const cpu& exec, const Request& request, const Case& c, Case& results) {
    return run_registered<cpu>(host_operators<cpu>, "cpu", exec, request, c, results);
}

}  // namespace interstate::tools::replay
