#include "host_operators.hpp"

namespace interstate::tools::replay {

Status run_on_reference(const Request& request, const Case& c, Case& results) {
    return run_registered<reference>(host_operators<reference>, "reference", {}, request, c, results);
}

std::vector<OperatorInfo> list_operators() {
    std::vector<OperatorInfo> list;
    for (const Entry<reference>& entry : host_operators<reference>)
        list.push_back({std::string(entry.name), entry.options()});
    return list;
}

}  // namespace interstate::tools::replay
