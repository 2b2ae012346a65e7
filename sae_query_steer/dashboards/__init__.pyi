from .writing import write_dashboards as write_dashboards
