#include <iterator>

#include "host_operators.hpp"

namespace interstate::tools::replay {

namespace {
std::vector<Entry<reference>> all_operators() {
    std::vector<Entry<reference>> all(std::begin(host_operators<reference>), std::end(host_operators<reference>));
    all.insert(all.end(), std::begin(reference_operators), std::end(reference_operators));
    return all;
}
}  // namespace

Status run_on_reference(const Request& request, const Case& c, Case& results) {
    return run_registered<reference>(all_operators(), "reference", {}, request, c, results);
}

std::vector<OperatorInfo> list_operators() {
    std::vector<OperatorInfo> list;
    for (const Entry<reference>& entry : all_operators())
        list.push_back({std::string(entry.name), entry.options()});
    return list;
}

}  // namespace interstate::tools::replay
