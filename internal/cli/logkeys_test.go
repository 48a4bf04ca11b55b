package cli

import (
	"go/ast"
	"go/constant"
	"go/types"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
	"golang.org/x/tools/go/types/typeutil"
)

// firstKey is the index of the first key in the arguments of the functions of
// slog.
var firstKey = map[string]int{
	"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "DebugContext": 2, "InfoContext": 2,
	"WarnContext": 2, "ErrorContext": 2,
	"Log": 3, "With": 0, "Group": 1,
}

// docs/monitoring.md lists exactly the keys that log lines have: operators
// search for them.
func TestLogKeys(t *testing.T) {
	const doc = "../../docs/monitoring.md"
	listed := documentedKeys(t, doc)
	if len(listed) == 0 {
		t.Fatalf("%s lists no keys", doc)
	}
	used := make(map[string]bool)
	check := func(pkg *packages.Package, at ast.Node, key ast.Expr) {
		value := pkg.TypesInfo.Types[key].Value
		if value == nil || value.Kind() != constant.String {
			t.Errorf("%v: a key of the log is not a constant", pkg.Fset.Position(at.Pos()))
			return
		}
		name := constant.StringVal(value)
		used[name] = true
		if !slices.Contains(listed, name) {
			t.Errorf("%v: the key %q is not in the list of %s", pkg.Fset.Position(at.Pos()),
				name, doc)
		}
	}
	calls := 0
	for _, pkg := range programPackages(t) {
		for _, file := range pkg.Syntax {
			ast.Inspect(file, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				f, ok := typeutil.Callee(pkg.TypesInfo, call).(*types.Func)
				if !ok || f.Pkg() == nil || f.Pkg().Path() != "log/slog" {
					return true
				}
				receiver := f.Signature().Recv()
				first, isLog := firstKey[f.Name()]
				switch {
				case receiver == nil && resultIsAttr(f):
					check(pkg, call, call.Args[0]) // slog.String and the like
					if f.Name() != "Group" {
						return true
					}
				case receiver != nil &&
					!strings.HasSuffix(receiver.Type().String(), "slog.Logger") || !isLog:
					return true
				}
				calls++
				for i := first; i < len(call.Args); i++ {
					switch {
					case call.Ellipsis.IsValid() && i == len(call.Args)-1:
						t.Errorf("%v: keys in a list are not checked: use Logger.With",
							pkg.Fset.Position(call.Pos()))
					case pkg.TypesInfo.Types[call.Args[i]].Type.String() == "log/slog.Attr":
						// checked at its creation
					default:
						check(pkg, call, call.Args[i])
						i++
					}
				}
				return true
			})
		}
	}
	if calls < 50 {
		t.Errorf("only %d log lines were found", calls)
	}
	for _, key := range listed {
		if !used[key] && !slices.Contains([]string{"time", "level", "msg"}, key) {
			t.Errorf("%s lists the key %q, which no line of the log has", doc, key)
		}
	}
}

func resultIsAttr(f *types.Func) bool {
	results := f.Signature().Results()
	return results.Len() == 1 && results.At(0).Type().String() == "log/slog.Attr"
}

// programPackages returns the packages of this module in the two programs.
func programPackages(t *testing.T) []*packages.Package {
	t.Helper()
	all, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedCompiledGoFiles | packages.NeedImports |
			packages.NeedTypes | packages.NeedSyntax | packages.NeedTypesInfo,
		// The library also calls go outside of any module, where -modfile in
		// the environment is an error.
		Env:        append(os.Environ(), "GOFLAGS="),
		BuildFlags: strings.Fields(os.Getenv("GOFLAGS")),
	}, "masquevpn/...")
	if err != nil {
		t.Fatal(err)
	}
	roots := make(map[string]*packages.Package)
	for _, p := range all {
		for _, e := range p.Errors {
			t.Fatal(e)
		}
		roots[p.PkgPath] = p
	}
	var list []*packages.Package
	var add func(path string)
	add = func(path string) {
		p := roots[path]
		if p == nil || slices.Contains(list, p) {
			return
		}
		list = append(list, p)
		for dep := range p.Imports {
			add(dep)
		}
	}
	add("masquevpn/cmd/masque-client")
	add("masquevpn/cmd/masque-proxy")
	return list
}

// documentedKeys returns the names in the first column of the table under the
// heading "Log keys".
func documentedKeys(t *testing.T, doc string) (keys []string) {
	t.Helper()
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "## Log keys\n")
	if !ok {
		t.Fatalf("%s has no section \"Log keys\"", doc)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	section, _, _ = strings.Cut(section, "\n## ")
	name := regexp.MustCompile("`([a-z0-9_.]+)`")
	for line := range strings.Lines(section) {
		if column, _, ok := strings.Cut(strings.TrimPrefix(line, "|"), "|"); ok &&
			strings.HasPrefix(line, "|") {
			for _, m := range name.FindAllStringSubmatch(column, -1) {
				keys = append(keys, m[1])
			}
		}
	}
	return keys
}
